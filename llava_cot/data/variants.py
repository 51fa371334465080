"""Make variants of four-stage conversations: with a stage left out, in another order, or without any stage.

``python -m llava_cot.data.variants IN.jsonl OUT.jsonl --variant NAME`` writes a variant of a data set over the same
images. Train models on the variants of one data set, from one base, to see what a stage is worth.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_cot.atomic import check_apart, check_output
from llava_cot.data.conversations import parse_conversation
from llava_cot.data.jsonl import write_jsonl
from llava_cot.data.rows import naming_row, parsed_rows
from llava_cot.stages import LLAVA_COT, STAGES, Stage

DESCRIBE = "Describe the image."
RESTATE = "What is to be done?"
Row = dict[str, Any]
Variant = Callable[[Mapping[str, Any]], list[Row]]


def in_order(row: Mapping[str, Any], order: Sequence[str], *, tags: bool = True) -> list[Row]:
    """Keep only the stages of ``order``, in this order, one paragraph each, with or without their tags."""

    def block(stage: str, text: str) -> str:
        open_tag, close_tag = LLAVA_COT.tag_pair(stage)
        return f"{open_tag} {text} {close_tag}" if tags else text

    return [_answered(row, ["\n\n".join(block(stage, texts[stage]) for stage in order) for texts in _stages(row)])]


def shuffled(row: Mapping[str, Any]) -> list[Row]:
    """Shuffle SUMMARY, CAPTION and REASONING by the row's id; the CONCLUSION stays last.

    The variant tests whether it matters which stages a stage can build on. A conclusion before its reasons would be a
    direct answer; ``conclusion first`` and ``direct`` test that.
    """
    order = list(STAGES[:-1])
    random.Random(parse_conversation(row).id).shuffle(order)
    return in_order(row, [*order, Stage.CONCLUSION])


def direct(row: Mapping[str, Any]) -> list[Row]:
    """Keep only the text of the CONCLUSION."""
    return in_order(row, [Stage.CONCLUSION], tags=False)


def direct_with_caption(row: Mapping[str, Any]) -> list[Row]:
    """Keep direct answers, and add a row ``ID-caption`` for the image whose answer is the first turn's CAPTION.

    The model learns from the captions too, but its answers cannot build on them.
    """
    caption = _stages(row)[0]["CAPTION"]
    return [*direct(row), *([_task(row, "caption", DESCRIBE, caption)] if parse_conversation(row).images else [])]


def apart(row: Mapping[str, Any]) -> list[Row]:
    """Make every stage of the first turn a task of its own, for a model that knows no stages.

    The rows are a direct answer, a description of the image, and two without the image: what the question asks for, and
    the reasoning from a given description. So a model learns each skill, but never one after the other.
    """
    question, texts = parse_conversation(row).turns[0].question, _stages(row)[0]
    blind = {name: value for name, value in row.items() if name != "image"}
    return [
        *direct_with_caption(row),
        _task(blind, "summary", f"{question} {RESTATE}", texts["SUMMARY"]),
        _task(blind, "reasoning", f"{texts['CAPTION']} {question}", texts["REASONING"]),
    ]


VARIANTS: dict[str, Variant] = {
    "full": partial(in_order, order=STAGES),
    **{f"without {left}": partial(in_order, order=[s for s in STAGES if s != left]) for left in STAGES[:-1]},
    "without tags": partial(in_order, order=STAGES, tags=False),
    "shuffled order": shuffled,
    "conclusion first": partial(in_order, order=[Stage.CONCLUSION, *STAGES[:-1]]),
    "direct": direct,
    "direct with caption": direct_with_caption,
    "apart": apart,
}
"""Functions from a conversation with the four stages in every answer to the rows that replace it."""


def convert(source: Path | str, target: Path | str, variant: str) -> int:
    """Write the variant of a data file, and return how many rows it has.

    Raises:
        ValueError: an unknown variant, or a row that is not a conversation in four stages. ``target`` is unchanged
            then.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, got {variant!r}")

    check_output(target, "target")
    check_apart(target, "target", source, "source")

    def rows() -> Iterator[Row]:
        for number, row in parsed_rows(source):
            with naming_row(source, number):
                made = VARIANTS[variant](row)
            yield from made

    return write_jsonl(rows(), target)


def _stages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the texts of the four stages of each turn."""
    found = []
    for index, turn in enumerate(parse_conversation(row).turns):
        if problem := LLAVA_COT.violation(turn.answer):
            raise ValueError(f"conversations[{2 * index + 1}] must have the four stages: {problem}")
        found.append({name: stage.text for name, stage in LLAVA_COT.parse(turn.answer).items()})
        if empty := [str(name) for name, text in found[-1].items() if not text]:
            raise ValueError(f"conversations[{2 * index + 1}] must have text in every stage, got none in {empty}")
    return found


def _answered(row: Mapping[str, Any], answers: Sequence[str]) -> Row:
    """Return ``row`` with these answers. Other fields stay."""
    return {**row, "conversations": _turns([turn.question for turn in parse_conversation(row).turns], answers)}


def _task(row: Mapping[str, Any], name: str, question: str, answer: str) -> Row:
    """Return an additional row beside ``row``."""
    return {**row, "id": f"{parse_conversation(row).id}-{name}", "conversations": _turns([question], [answer])}


def _turns(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    pairs = zip(questions, answers, strict=True)
    return [turn for q, a in pairs for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.jsonl")
    parser.add_argument("target", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--variant", required=True, choices=VARIANTS)
    args = parser.parse_args()
    try:
        print(f"{convert(args.source, args.target, args.variant)} rows in {args.target}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
