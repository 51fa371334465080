"""Encode a conversation as a training example: what the model reads, what it learns, and the stage of each token.

No text is searched for. The chat template renders each turn up to the answer, then the answer, then the end of the
turn. Only the tokens after the generation prompt are learnt.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cot.chat import render
from llava_cot.core import Bos
from llava_cot.data.conversations import Conversation
from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.literal import SPECIAL_TOKEN, marked, special_tokens, token_ids, unmarked
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from llava_cot.families import Training


def encode(
    conversation: Conversation,
    processor: "ProcessorMixin",
    *,
    grammar: Grammar = LLAVA_COT,
    bos: Bos = "one",
    image_folder: Path | str = "",
) -> Example:
    """Encode a conversation. The images come before the first question.

    A prompt and an answer are tokenized apart, as when the model answers. So the ids up to the first answer are those
    of ``build_inputs``. Labels are the tokens of the answers and the token that ends each answer's turn. A token
    belongs to the stage that has its first character; tags are part of their stage. The text after a stage, up to the
    next opening tag, and the end of the turn belong to that stage too.

    Raises:
        ValueError: the template does not render a conversation as a continuation of its beginning, or an answer spells
            a token of a turn, such as ``<|eot_id|>``.
    """
    try:
        input_ids, labels, stages = _encode_turns(conversation, processor, grammar, bos)
        check_counts("its tokens must contain", input_ids, processor, images=len(conversation.images), bos=bos)
    except ValueError as error:
        raise ValueError(f"conversation {conversation.id!r}: {error}") from None
    return Example(input_ids, labels, stages, [str(Path(image_folder) / path) for path in conversation.images])


def check_counts(rule: str, input_ids: Sequence[int], processor: "ProcessorMixin", *, images: int, bos: Bos) -> None:
    """Check that these tokens have so many image tokens and the BOS of ``bos``.

    Raises:
        ValueError: they do not; the message begins with ``rule``.
    """
    for what, token, expected in (
        ("an image token", processor.image_token_id, images),
        ("a BOS", processor.tokenizer.bos_token_id, 2 if bos == "released" else 1),
    ):
        if token is not None and (got := input_ids.count(token)) != expected:
            raise ValueError(f"{rule} {what} {expected} times, got {got}")


def expand_images(example: Example, processor: "ProcessorMixin", training: "Training") -> Example:
    """Return the example with as many image tokens for each of its images as the image takes.

    Raises:
        ValueError: the size of an image can't be read.
    """
    counts = [training.image_tokens(processor, path) for path in example.images]
    if all(count == 1 for count in counts):
        return example
    images = iter(counts)
    times = [next(images) if token == processor.image_token_id else 1 for token in example.input_ids]

    def repeated(values: list[int]) -> list[int]:
        return [value for value, count in zip(values, times, strict=True) for _ in range(count)]

    input_ids, labels, stages = map(repeated, (example.input_ids, example.labels, example.stages))
    return replace(example, input_ids=input_ids, labels=labels, stages=stages)


def _encode_turns(
    conversation: Conversation, processor: "ProcessorMixin", grammar: Grammar, bos: Bos
) -> tuple[list[int], list[int], list[int]]:
    tokenizer = processor.tokenizer
    special = special_tokens(tokenizer).ids
    messages: list[dict] = []
    input_ids: list[int] = []
    labels: list[int] = []
    stages: list[int] = []

    def extend(ids: list[int], stage: list[int] | None = None) -> None:
        """Append tokens: learnt ones with their stages, or context if ``stage`` is None."""
        input_ids.extend(ids)
        labels.extend(ids if stage is not None else [IGNORE_INDEX] * len(ids))
        stages.extend(stage if stage is not None else [-1] * len(ids))

    text = ""
    for index, turn in enumerate(conversation.turns):
        images = [{"type": "image"} for _ in conversation.images] if index == 0 else []
        question = marked(turn.question, tokenizer)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        prompt = render(processor, messages, add_generation_prompt=True)
        begin = _rest(prompt, text, f"turn {index}'s prompt")
        written = index > 0 or begin.startswith(tokenizer.bos_token or "")
        add_bos = index == 0 and (bos == "released" or not written)
        extend(token_ids(begin, tokenizer, add_special_tokens=add_bos))

        answer, stages_of_answer, last_stage = _encode_answer(turn.answer, processor, grammar, f"turn {index}'s answer")
        extend(answer, stages_of_answer)

        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        text = render(processor, messages, add_generation_prompt=False)
        end = tokenizer(_rest(text, prompt + turn.answer, f"turn {index}"), add_special_tokens=False)["input_ids"]
        closes = next((at + 1 for at, token in enumerate(end) if token in special), 0)
        if not closes:
            raise ValueError("the chat template must end an assistant's turn with a special token, got none")
        extend(end[:closes], [last_stage] * closes)
        extend(end[closes:])
    return input_ids, labels, stages


def _encode_answer(
    answer: str, processor: "ProcessorMixin", grammar: Grammar, what: str
) -> tuple[list[int], list[int], int]:
    """Return the tokens of an answer, the stage of each, and the stage at its end.

    Only a tag may be a special token; others are text.
    """
    tokenizer = processor.tokenizer
    if (found := SPECIAL_TOKEN.search(answer)) and found[0] in tokenizer.get_added_vocab():
        raise ValueError(f"{what} must be plain text, got the special token {found[0]!r}")
    written = marked(answer, tokenizer, keep=grammar.all_tags)
    tokens = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
    opened, stage_of = _stage_starts(written, grammar)
    # Tokens are adjacent, although a tokenizer may trim spaces from its offsets.
    starts, ends = zip(*tokens["offset_mapping"])
    firsts = map(min, starts, (0, *ends))
    stages = [stage_of[bisect_right(opened, first)] for first in firsts]
    kept = unmarked(tokens["input_ids"], written, tokenizer)
    return [tokens["input_ids"][at] for at in kept], [stages[at] for at in kept], stage_of[-1]


def _rest(text: str, before: str, what: str) -> str:
    if not text.startswith(before):
        at = next((at for at, (got, expected) in enumerate(zip(text, before)) if got != expected), len(text))
        raise ValueError(
            f"{what} must be rendered by the chat template as a continuation of {before[max(0, at - 20) : at + 20]!r}, "
            f"got {text[max(0, at - 20) : at + 20]!r}"
        )
    return text[len(before) :]


def _stage_starts(text: str, grammar: Grammar) -> tuple[list[int], list[int]]:
    """Return where stages open, and the stages between these places; before the first it is -1."""
    found = grammar.starts(text)
    return [start for start, _ in found], [-1, *(grammar.names.index(name) for _, name in found)]
