"""What a tokenizer must give: the bytes of its tokens, and stage tags that are found however they are spelt."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from llava_cot.check.kit import Kit, Mismatch
from llava_cot.detokenise import Detokeniser
from llava_cot.stages import Grammar
from llava_cot.vocabulary import Vocabulary

LETTERS = "abcXYZ 019.,:;!?<>/|\n\t'\"-_=()[]{}éßñ中文字漢あアم한🙂👩\u200d🔬𝔸"


def random_text(rng: random.Random, most: int) -> str:
    """Return up to ``most`` characters of several scripts. It has no half of a character."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, most)))


def random_spelling(text: str, ids: Mapping[bytes, int], rng: random.Random) -> list[int]:
    """Return tokens that spell ``text``, drawn from all that do. ``ids`` are the tokens by their bytes."""
    data, spelling, at = text.encode(), list[int](), 0
    most = max(map(len, ids))
    while at < len(data):
        fitting = [size for size in range(1, most + 1) if at + size <= len(data) and data[at : at + size] in ids]
        size = rng.choice(fitting)
        spelling.append(ids[data[at : at + size]])
        at += size
    return spelling


def token_text(kit: Kit) -> str:
    """The bytes of all tokens are the text that was tokenized, and a stream of it never cuts a character."""
    return check_texts(kit.processor.tokenizer, kit.grammar, 200)


def stop_tags(kit: Kit) -> str:
    """A tag that ends a stage is found once, at its last token, however it is spelt and whatever stands around it."""
    return check_spellings(kit.processor.tokenizer, kit.grammar, 200)


def check_texts(tokenizer: Any, grammar: Grammar, count: int) -> str:
    """Check ``count`` random texts. Raises ``Mismatch``; see ``check_text``."""
    rng = random.Random(0)
    vocabulary = Vocabulary(tokenizer, grammar.all_tags)
    for _ in range(count):
        text = random_text(rng, 40)
        check_text(text, tokenizer(text, add_special_tokens=False)["input_ids"], vocabulary.token_bytes)
    return f"{count} texts"


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


def check_spellings(tokenizer: Any, grammar: Grammar, count: int) -> str:
    """Check that the tags of ``grammar`` are found in ``count`` random spellings. Raises ``Mismatch`` if one is not."""
    rng = random.Random(1)
    vocabulary = Vocabulary(tokenizer, grammar.all_tags)
    names = [stop.text for stop in grammar.stops]
    tags = vocabulary.stop_tags(names)
    ids = {data: token for token, data in enumerate(vocabulary.token_bytes) if data and len(data) <= 32}
    for _ in range(count if names else 0):
        number = rng.randrange(len(names))
        before, after = (random_text(rng, 12).replace("<", "").replace("\n", " ") for _ in range(2))
        spelling = random_spelling(before + names[number] + after, ids, rng)
        state, found, read = tags.start_state, list[tuple[int, int]](), 0
        for token in spelling:
            state, tag, overhang = tags.advance(state, token)
            read += len(vocabulary.token_bytes[token])
            found += [(tag, read - overhang)] * (tag >= 0)
        at = len((before + names[number]).encode())
        if found != [(number, at)]:
            text = before + names[number] + after
            raise Mismatch(f"{names[number]!r} is found at {found} in {text!r}, spelt as {spelling}")
    return f"{count} spellings of {len(names)} tags"


TEXT_CHECKS = (token_text, stop_tags)
