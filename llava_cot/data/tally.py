"""The results of a validation, by source."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from llava_cot.data.checks import Verdict

MAX_SOURCES = 1000  # garbage may have as many sources as lines; further ones are counted together
OTHERS = "(others)"


@dataclass
class Tally:
    """The lines of one source. A quarantined line has one reason; a clean one may have several warnings."""

    clean: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    def to_dict(self) -> dict[str, Any]:
        counts = {"clean": self.clean, "quarantined": self.quarantined}
        return counts | {"reasons": dict(self.reasons.most_common()), "warnings": dict(self.warnings.most_common())}


@dataclass
class Report:
    """The tally of every source, and how many lines were blank."""

    blank: int = 0
    sources: dict[str, Tally] = field(default_factory=dict)

    def add(self, verdict: Verdict | None) -> None:
        """Count one line. None is a blank line."""
        if verdict is None:
            self.blank += 1
            return
        source = verdict.source
        if source not in self.sources and len(self.sources) >= MAX_SOURCES:
            source = OTHERS
        tally = self.sources.setdefault(source, Tally())
        if verdict.defect is not None:
            tally.reasons[verdict.defect.kind] += 1
        else:
            tally.clean += 1
            tally.warnings.update(verdict.warnings)

    @property
    def total(self) -> Tally:
        total = Tally()
        for tally in self.sources.values():
            total.clean += tally.clean
            total.reasons += tally.reasons
            total.warnings += tally.warnings
        return total

    @property
    def lines(self) -> int:
        return self.total.clean + self.total.quarantined + self.blank

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, in which ``lines == clean + quarantined + blank``."""
        sources = {name: tally.to_dict() for name, tally in sorted(self.sources.items())}
        return {"lines": self.lines, "blank": self.blank, **self.total.to_dict(), "sources": sources}

    def to_table(self) -> Table:
        """Return a table for the terminal, with a row per source and their sum."""
        title = f"{self.lines} lines" + (f", {self.blank} of them blank" if self.blank else "")
        table = Table(title=title, title_justify="left")
        table.add_column("source")
        table.add_column("clean", justify="right", style="green")
        table.add_column("bad", justify="right", style="red")
        table.add_column("why bad")
        table.add_column("kept, but worth a look")
        rows = sorted(self.sources.items())
        for name, tally in [*rows, ("all", self.total)]:
            if name == "all" and rows:
                table.add_section()
            counts = (f"{tally.clean}", f"{tally.quarantined}" if tally.quarantined else "")
            table.add_row(Text(name), *counts, _listed(tally.reasons), _listed(tally.warnings))
        return table


def _listed(counts: Counter[str]) -> Text:
    return Text("\n".join(f"{count} {kind}" for kind, count in counts.most_common()))
