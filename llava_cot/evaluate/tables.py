"""The tables of the paper, from run folders, beside the published rows."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cot.evaluate.folder import SUMMARY, read_object
from llava_cot.evaluate.pages.markdown import protocol_rows
from llava_cot.evaluate.published import ALL, COLUMN_OF, PUBLISHED, Published, Table
from llava_cot.evaluate.result import GRADED

TITLES: dict[Table, str] = {
    "main": "Main table",
    "stages": "Stages removed",
    "searches": "Searches",
}
# What one row must have in common; the preset and the rules too, unless each run has its benchmark's default.
SAME = ("model_sha256", "grammar", "system", "bos", "dtype", "quantize", "limit", "repeats")
CAP = "max_new_tokens"
NAMES = dict(zip(ALL, ("MMStar", "MMBench", "MMVet", "MathVista", "AI2D", "HallusionBench")))  # where there is no run
NEEDED = "title", "headline", "n", "accuracy", "interval", "rules", "usage", "protocol"


@dataclass(frozen=True)
class Entry:
    """The summary of a run as tables need it."""

    path: Path
    summary: Mapping[str, Any]

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.summary["protocol"]

    @property
    def column(self) -> tuple[str, str]:
        """The benchmark and its file."""
        return self.protocol["benchmark"], str(self.dataset.get("md5"))

    @property
    def dataset(self) -> Mapping[str, Any]:
        return self.protocol.get("dataset") or {}

    @property
    def row(self) -> tuple[str, str]:
        """The model and the search with its settings, apart from the most tokens."""
        settings = {"scorer": self.protocol.get("scorer"), **(self.protocol.get("settings") or {})}
        named = [f"{name}={_plain(value)}" for name, value in settings.items() if name != CAP and value is not None]
        return str(self.protocol.get("model")), ", ".join([str(self.protocol.get("search")), *named])

    @property
    def is_partial(self) -> bool:
        """Whether its file has fewer questions than were published."""
        rows, expected = self.dataset.get("rows"), self.dataset.get("expected_rows")
        return bool(self.dataset.get("partial")) or (rows is not None and expected is not None and rows < expected)


@dataclass
class Notes:
    """Footnotes, numbered from 1 in the order in which they are first needed."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def read_entry(path: Path | str) -> Entry:
    """Read the summary of a run folder.

    Raises:
        ValueError: it has none, or one that lacks something.
    """
    file = Path(path) / SUMMARY
    if not file.is_file():
        raise ValueError(f"runs must be folders of finished runs, got {str(path)!r} without {SUMMARY}")
    summary = read_object(file)
    missing = [name for name in NEEDED if name not in summary]
    if missing or not isinstance(summary["protocol"], dict) or "benchmark" not in summary["protocol"]:
        raise ValueError(f"{str(file)!r} must be the summary of a run, got one without {(missing or ['protocol'])[0]}")
    return Entry(Path(path), summary)


def make_tables(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the main table and the two ablation tables as a mapping that JSON can hold.

    Columns are the benchmarks of the runs, one for each file; without runs, those of the paper. A row is a model and a
    search. Published rows follow where they have a number in a column. "stages" has the models that share a search, and
    "searches" the searches that share a model. A table without rows is left out.

    Raises:
        ValueError: two runs of one row have unlike protocols, or two runs are of the same row and column. The message
            names both runs and the field.
    """
    rows: dict[tuple[str, str], dict[tuple[str, str], Entry]] = defaultdict(dict)
    for entry in entries:
        row = rows[entry.row]
        for other in row.values():
            _check_alike(other, entry)
        if entry.column in row:
            raise ValueError(
                f"runs must differ in model, search or benchmark, got two of {', '.join(entry.row)} on "
                f"{entry.protocol['benchmark']}: {str(row[entry.column].path)!r} and {str(entry.path)!r}"
            )
        row[entry.column] = entry
    columns = list(dict.fromkeys(entry.column for entry in entries)) or [(name, "") for name in ALL]
    chosen: dict[Table, list[tuple[str, str]]] = {
        "main": list(rows),
        "stages": _shared(rows, by=1),
        "searches": _shared(rows, by=0),
    }
    notes, tables = Notes(), []
    for name, keys in chosen.items():
        lines = [_own_row(key, rows[key], columns, notes) for key in keys]
        for published in PUBLISHED:
            if published.table == name and any(_column_of(column) in published.numbers for column, _ in columns):
                lines.append(_published_row(published, columns, entries, notes))
        if lines:
            tables.append({"name": name, "title": TITLES[name], "rows": lines})
    return {"columns": _columns(columns, entries), "tables": tables, "notes": notes.texts}


def kind_of(entry: Entry) -> dict[str, str]:
    """Return what makes runs of one benchmark unlike: the version of MMBench, the images of AI2D, MMVet's judge.

    Any benchmark may have been asked in part.
    """
    name = entry.protocol["benchmark"]
    kind = {"questions": "a part" if entry.is_partial or entry.protocol.get("limit") is not None else "all"}
    if _column_of(name) == "ai2d":
        kind["images"] = "unmasked" if name == "ai2d_unmasked" else "masked"
    if name == "mmbench":
        variant = str(entry.dataset.get("variant") or "")
        kind["version"] = ("1.1" if "V11" in variant.upper() else "1.0") if variant else "not known"
    if name == "mmvet":
        rules = [rule for rule in entry.summary["rules"] if rule.startswith(GRADED)]
        judges = dict.fromkeys(rule.removeprefix(GRADED).partition(", which gave no grade")[0] for rule in rules)
        kind["judge"] = ", ".join(judges) or "none"
    return kind


def _check_alike(a: Entry, b: Entry) -> None:
    for name, one, two in (
        *((name, a.protocol.get(name), b.protocol.get(name)) for name in SAME),
        (f"settings.{CAP}", *((each.protocol.get("settings") or {}).get(CAP) for each in (a, b))),
        ("dataset.partial", a.is_partial, b.is_partial),
        *((name, *_unlike_defaults(a, b, name)) for name in ("preset", "rules")),
    ):
        if one != two:
            raise ValueError(
                f"runs of one row must have the same {name}, got {one!r} in {str(a.path)!r} and {two!r} in "
                f"{str(b.path)!r}; both are {', '.join(a.row)}"
            )


def _unlike_defaults(a: Entry, b: Entry, name: str) -> tuple[Any, Any]:
    """Return the preset or the rules of both, or None for both if each has the default of its benchmark."""
    from llava_cot.evaluate.benchmarks import BENCHMARKS

    values = [each.protocol.get(name) for each in (a, b)]
    defaults = [getattr(BENCHMARKS.get(each.protocol["benchmark"]), f"default_{name}", None) for each in (a, b)]
    return (None, None) if values == defaults else (values[0], values[1])


def _shared(rows: Iterable[tuple[str, str]], by: int) -> list[tuple[str, str]]:
    """Return the rows that share their model (0) or search (1) with another row, those that share it together."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        found[row[by]].append(row)
    return [row for some in found.values() if len(some) > 1 for row in some]


def _own_row(
    key: tuple[str, str],
    of: Mapping[tuple[str, str], Entry],
    columns: Sequence[tuple[str, str]],
    notes: Notes,
) -> dict[str, Any]:
    cells = [_own_cell(of[column], notes) if column in of else None for column in columns]
    tokens = [cell["tokens"] for cell in cells if cell and cell["tokens"] is not None]
    return {
        "model": key[0],
        "search": key[1],
        "source": None,
        "cells": cells,
        "mean": _mean(cells),
        "tokens": sum(tokens) / len(tokens) if tokens else None,
    }


def _own_cell(entry: Entry, notes: Notes) -> dict[str, Any]:
    summary = entry.summary
    shown = {name: value for name, value in entry.protocol.items() if name not in ("model", "model_sha256", "search")}
    settings = {CAP: (entry.protocol.get("settings") or {}).get(CAP)}
    facts = "; ".join(
        f"{name} {value}" for name, value in protocol_rows(shown | {"settings": settings, "scorer": None})
    )
    note = f"{summary['headline']}, 95 % interval in parentheses; n {summary['n']:,}; {facts}"
    return {
        "value": summary["accuracy"],
        "interval": summary["interval"],
        "tokens": (summary["usage"].get("generated_tokens") or {}).get("mean"),
        "run": str(entry.path),
        "notes": [notes.number(note)],
    }


def _published_row(
    row: Published, columns: Sequence[tuple[str, str]], entries: Sequence[Entry], notes: Notes
) -> dict[str, Any]:
    source = notes.number(f"{row.source.name}: {row.source.note}")
    cells: list[dict[str, Any] | None] = []
    for name, md5 in columns:
        number = row.numbers.get(_column_of(name))
        if number is None:
            cells.append(None)
            continue
        marks = []
        kinds = [kind_of(entry) for entry in entries if entry.column == (name, md5)]
        for what, theirs in {"questions": "all", **row.source.protocols.get(_column_of(name), {})}.items():
            for own in dict.fromkeys(kind[what] for kind in kinds if what in kind):
                if theirs is None or not own.lower().startswith(theirs):
                    said = "not said there" if theirs is None else f"{theirs} there"
                    marks.append(notes.number(f"† another protocol, {what}: {said}, {own} here"))
        cells.append({"value": number / 100, "interval": None, "tokens": None, "run": None, "notes": marks})
    return {
        "model": row.model,
        "search": row.search,
        "source": {"name": row.source.name, "note": source},
        "cells": cells,
        "mean": _mean(cells),
        "tokens": None,
    }


def _mean(cells: Sequence[Mapping[str, Any] | None]) -> float | None:
    """Return the plain mean of a row that has every column; None with a single column."""
    values = [cell["value"] for cell in cells if cell is not None and cell["value"] is not None]
    return sum(values) / len(values) if len(values) == len(cells) > 1 else None


def _columns(columns: Sequence[tuple[str, str]], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the names of the columns. Two files of one benchmark have the name of the file too."""
    found = []
    for name, md5 in columns:
        entry = next((each for each in entries if each.column == (name, md5)), None)
        title = NAMES.get(name, name) if entry is None else entry.summary["title"]
        if entry is not None and sum(other == name for other, _ in columns) > 1:
            title += f" ({entry.dataset.get('variant') or md5[:8]})"
        found.append({"benchmark": name, "md5": md5, "title": title})
    return found


def _column_of(benchmark: str) -> str:
    return COLUMN_OF.get(benchmark, benchmark)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
