"""Read what earlier runs did: which ids are done, which are asked again, and what was spent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cot.data.annotation.cost import Usage
from llava_cot.journal import Journal, JournalKind, read_journal

ANNOTATION = JournalKind("annotate", frozenset({"id", "provenance"}))  # accepted and rejected records


@dataclass
class Past:
    """The ids to skip, and the usage of all runs."""

    done: set[str] = field(default_factory=set)
    usage: Usage = field(default_factory=Usage)
    again: dict[str, Usage] = field(default_factory=dict)  # rejects that are asked again, with their usage
    records: int = 0  # accepted ones
    turns: int = 0  # turns of the accepted records
    accepted_usage: Usage = field(default_factory=Usage)


def read_past(out: Path, rejects: Path, retry_rejects: bool) -> Past:
    """Read both files. A rejected id is done too, unless it is to be asked again."""
    past = Past()
    for record in read_journal(out, ANNOTATION):
        usage = Usage(**record["provenance"]["usage"])
        past.done.add(str(record["id"]))
        past.records += 1
        past.turns += len(record["conversations"]) // 2
        past.accepted_usage.add(usage)
        past.usage.add(usage)
    for name, record in _fresh(out, rejects).items():
        usage = Usage(**record["provenance"]["usage"])
        past.usage.add(usage)
        # A missing image costs no request, and the image may exist by now.
        if retry_rejects or record["kind"] == "image":
            past.again[name] = usage
        else:
            past.done.add(name)
    return past


def _fresh(out: Path, rejects: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each id among the rejects, without ids that were accepted later."""
    found = {str(record["id"]): record for record in read_journal(rejects, ANNOTATION)}
    if found:
        for record in read_journal(out, ANNOTATION):
            found.pop(str(record["id"]), None)
    return found


def drop_stale(out: Path, rejected: Journal) -> None:
    """Keep only the last record of each id among the rejects, and none of an id that was accepted later."""
    fresh = _fresh(out, rejected.path)
    if len(fresh) < sum(1 for _ in read_journal(rejected.path, ANNOTATION)):
        rejected.keep(fresh.values())
