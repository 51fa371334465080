"""What a tokenizer must give: the bytes of its tokens, and stage tags that are found however they are spelt."""

import random
from collections.abc import Sequence

from llava_cot.check.kit import Kit, Mismatch
from llava_cot.detokenise import Detokeniser
from llava_cot.vocabulary import Vocabulary

LETTERS = "abcXYZ 019.,:;!?<>/|\n\t'\"-_=()[]{}éßñ中文字漢あアم한🙂👩\u200d🔬𝔸"


def random_text(rng: random.Random, most: int) -> str:
    """Return up to ``most`` characters of several scripts. It has no half of a character."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, most)))


def random_spelling(text: str, tokenizer: object, rng: random.Random) -> list[int]:
    """Return tokens that spell ``text``, which is cut at random places and tokenized piece by piece."""
    ids, at = list[int](), 0
    while at < len(text):
        end = at + rng.choice((1, 1, 2, 3, 5, 8, 100))
        ids += tokenizer(text[at:end], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        at = end
    return ids


def token_text(kit: Kit) -> str:
    """The bytes of all tokens are the text that was tokenized, and a stream of it never cuts a character."""
    tokenizer, rng = kit.processor.tokenizer, random.Random(0)
    vocabulary = Vocabulary(tokenizer, kit.grammar.all_tags)
    for _ in range(200):
        text = random_text(rng, 40)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        check_text(text, ids, vocabulary.token_bytes)
    return "200 texts"


def check_text(text: str, ids: Sequence[int], token_bytes: Sequence[bytes]) -> None:
    """Check that ``ids`` spell ``text``, and that their text can be shown token by token.

    A SentencePiece tokenizer puts a space before a text.

    Raises:
        Mismatch: they do not.
    """
    whole = Detokeniser(token_bytes).add(ids)
    if whole.removeprefix(" ") != text.removeprefix(" "):
        raise Mismatch(f"the tokens of {text!r} spell {whole!r}")
    streaming = Detokeniser(token_bytes)
    shown = [streaming.add([token]) for token in ids]
    if "".join(shown) != whole or any("\ufffd" in part for part in shown if "\ufffd" not in text):
        raise Mismatch(f"a stream of {text!r} shows {shown!r}")


def stop_tags(kit: Kit) -> str:
    """A closing tag is found once, at its last token, however it is spelt and whatever stands around it."""
    tokenizer, rng = kit.processor.tokenizer, random.Random(1)
    vocabulary = Vocabulary(tokenizer, kit.grammar.all_tags)
    names = [stop.text for stop in kit.grammar.stops]
    tags = vocabulary.stop_tags(names)
    for _ in range(200):
        number = rng.randrange(len(names))
        before, after = (random_text(rng, 12).replace("<", "") for _ in range(2))
        ids = random_spelling(before + names[number] + after, tokenizer, rng)
        state, found, read = tags.start_state, list[tuple[int, int]](), 0
        for token in ids:
            state, tag, overhang = tags.advance(state, token)
            read += len(vocabulary.token_bytes[token]) if token < len(vocabulary.token_bytes) else 0
            found += [(tag, read - overhang)] * (tag >= 0)
        spelt = b"".join(vocabulary.token_bytes[token] for token in ids)
        at = spelt.find(names[number].encode()) + len(names[number].encode())
        if found != [(number, at)]:
            raise Mismatch(f"{names[number]!r} is found {found} times in {spelt!r}, as the tokens {ids}")
    return f"200 spellings of {len(names)} tags"


TEXT_CHECKS = (token_text, stop_tags)
