"""Published numbers of LLaVA-CoT, in percent, each with its source, its version and what is known of its protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Table = Literal["main", "stages", "searches"]


@dataclass(frozen=True)
class Source:
    """Where numbers stand.

    Attributes:
        name: with its version.
        note: what a reader has to know about all of its numbers.
        protocols: by benchmark, what a run must be like to be compared: the names and values of ``tables.kind_of``.
            None is what the source does not say.
    """

    name: str
    note: str
    protocols: Mapping[str, Mapping[str, str | None]]


@dataclass(frozen=True)
class Published:
    """A row of a published table. ``numbers`` has percentages by the name of the benchmark."""

    table: Table
    model: str
    search: str
    source: Source
    numbers: Mapping[str, float]


# The names of benchmarks whose numbers stand in one published column.
COLUMN_OF = {"ai2d_unmasked": "ai2d"}
SAMPLING = "VLMEvalKit, one run; temperature 0.6, top-p 0.9 and at most 2,048 new tokens."
GPT_4 = {"mmvet": {"judge": "gpt-4"}}

V6 = Source(
    "arXiv:2411.10440v6 (ICCV 2025)",
    f"{SAMPLING} Which file AI2D is from is not said; near 79 it is probably the masked one.",
    {**GPT_4, "mmbench": {"version": "1.1"}, "ai2d": {"images": "masked"}},
)
CARD = Source(
    "model card of Xkev/Llama-3.2V-11B-cot",
    f"{SAMPLING} Which files MMBench and AI2D are from is not said; near 85 AI2D is probably the unmasked one.",
    {**GPT_4, "mmbench": {"version": None}, "ai2d": {"images": "unmasked"}},
)
SUMMARY = Source(
    "a summary of arXiv:2411.10440, version not known",
    "Not verified: the rows of left-out stages and of token beams stand in no version of the paper that was found.",
    {**GPT_4, "mmbench": {"version": None}, "ai2d": {"images": None}},
)

ALL = "mmstar", "mmbench", "mmvet", "mathvista", "ai2d", "hallusionbench"
FIVE = ALL[:-1]
THREE = "mmstar", "mathvista", "ai2d"


def _row(table: Table, model: str, search: str, source: Source, names: tuple[str, ...], text: str) -> Published:
    numbers = {name: float(number) for name, number in zip(names, text.split(), strict=True) if number != "-"}
    return Published(table, model, search, source, numbers)


PUBLISHED = (
    _row("main", "Llama-3.2-11B-Vision-Instruct", "sample", V6, ALL, "49.8 65.8 57.6 48.6 77.3 40.3"),
    _row("main", "direct answers, same 100k", "sample", V6, ALL, "54.3 76.2 49.9 49.5 81.2 42.9"),
    _row("main", "stages without tags", "sample", V6, ALL, "55.7 74.2 57.0 54.1 79.1 45.0"),
    _row("main", "LLaVA-CoT", "sample", V6, ALL, "57.6 75.0 60.3 54.8 78.7 47.8"),
    _row("main", "LLaVA-CoT", "SWIRES", V6, ALL, "62.5 77.6 64.9 57.7 81.0 49.1"),
    _row("main", "LLaVA-CoT", "sample", CARD, ALL, "57.6 75.0 60.3 54.8 85.7 47.8"),
    _row("main", "Llama-3.2-11B-Vision", "sample", SUMMARY, FIVE, "49.8 65.8 57.6 48.6 77.0"),
    _row("main", "GPT-4o-mini", "sample", SUMMARY, FIVE, "54.8 76.9 - 52.4 77.8"),
    _row("main", "Gemini-1.5-pro", "sample", SUMMARY, FIVE, "57.6 73.9 - 57.7 79.1"),
    _row("main", "Llama-3.2-90B-Vision", "sample", SUMMARY, FIVE, "56.2 78.3 - 58.3 78.9"),
    _row("main", "LLaVA-CoT", "sample", SUMMARY, FIVE, "57.6 73.8 60.8 54.8 85.0"),
    _row("main", "LLaVA-CoT", "SWIRES", SUMMARY, FIVE, "59.2 75.1 62.3 57.2 86.4"),
    _row("stages", "direct answers, same 100k", "sample", V6, ALL, "54.3 76.2 49.9 49.5 81.2 42.9"),
    _row("stages", "stages without tags", "sample", V6, ALL, "55.7 74.2 57.0 54.1 79.1 45.0"),
    _row("stages", "LLaVA-CoT", "sample", V6, ALL, "57.6 75.0 60.3 54.8 78.7 47.8"),
    _row("stages", "all four stages", "sample", SUMMARY, THREE, "57.6 54.8 85.0"),
    _row("stages", "without SUMMARY", "sample", SUMMARY, THREE, "55.8 52.3 83.1"),
    _row("stages", "without CAPTION", "sample", SUMMARY, THREE, "56.1 53.1 82.8"),
    _row("stages", "without REASONING", "sample", SUMMARY, THREE, "50.2 47.5 78.2"),
    _row("stages", "direct answer", "sample", SUMMARY, THREE, "49.8 48.6 77.0"),
    _row("searches", "LLaVA-CoT", "no search, at equal time", V6, ("mmstar",), "57.6"),
    _row("searches", "LLaVA-CoT", "best-of-N, at equal time", V6, ("mmstar",), "60.1"),
    _row("searches", "LLaVA-CoT", "stage beam, at equal time", V6, ("mmstar",), "61.2"),
    _row("searches", "LLaVA-CoT", "SWIRES, at equal time", V6, ("mmstar",), "62.5"),
    _row("searches", "LLaVA-CoT", "sample", SUMMARY, THREE, "57.6 54.8 85.0"),
    _row("searches", "LLaVA-CoT", "token beam", SUMMARY, THREE, "58.0 55.5 85.8"),
    _row("searches", "LLaVA-CoT", "SWIRES", SUMMARY, THREE, "59.2 57.2 86.4"),
)
