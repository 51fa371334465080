"""The stage grammar: which tags may come in which order, and how a text follows them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict, Unpack

from llava_cot.core import check_kind, whole_number


class Stage(StrEnum):
    """The four stages of LLaVA-CoT, in order."""

    SUMMARY = "SUMMARY"
    CAPTION = "CAPTION"
    REASONING = "REASONING"
    CONCLUSION = "CONCLUSION"

    @property
    def open_tag(self) -> str:
        return f"<{self.value}>"

    @property
    def close_tag(self) -> str:
        return f"</{self.value}>"


STAGES = tuple(Stage)


class Outcome(StrEnum):
    """How a stage was found in a text."""

    COMPLETE = "complete"  # closed, and opened at most ``max_visits`` times
    UNCLOSED = "unclosed"  # opened, but not closed
    MISSING = "missing"  # never opened
    REPEATED = "repeated"  # opened more than ``max_visits`` times; ``text`` is that of the first


@dataclass(frozen=True)
class StageText:
    """One stage of a parsed text: the stripped text between its tags, and its outcome."""

    stage: str
    text: str
    outcome: Outcome


class _Settings(TypedDict, total=False):
    start: Sequence[str]
    max_visits: Mapping[str, int]
    tags: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Grammar:
    """Which stages a model writes and which may come after which.

    One follower fixes the order. Among several followers the tag that the model closes decides. A follower that
    leads back to an earlier stage makes a loop. An answer begins with a stage of ``start`` and ends with a stage that
    has no followers. The last such stage in ``follows`` is the conclusion.

    Args:
        follows: for each stage the stages that may come next, in the order of preference.
        start: the stages that may come first; by default the first one in ``follows``.
        max_visits: how often a stage may occur in one answer; by default once.
        tags: the opening and the closing tag of a stage; by default ``<NAME>`` and ``</NAME>``.

    Raises:
        ValueError: no stage, a name that is no stage, ``max_visits`` below 1, no pair of tags, an empty tag, two equal
            tags, or a stage from which no end can be reached.
        TypeError: an argument of another type.
    """

    follows: Mapping[str, Sequence[str]]
    start: Sequence[str] = ()
    max_visits: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("follows", "max_visits", "tags"):
            check_kind(argument, getattr(self, argument), Mapping, "a mapping whose keys are stages")
        names = self.names
        for name in names:
            check_kind("follows", name, str, "a mapping whose keys are names of stages")
        if not names:
            raise ValueError("follows must have at least one stage, got none")
        mentioned = {"start": self.start, "max_visits": self.max_visits, "tags": self.tags}
        mentioned |= {f"follows[{str(name)!r}]": after for name, after in self.follows.items()}
        for argument, stages in mentioned.items():
            if isinstance(stages, str):
                raise ValueError(f"{argument} must be a sequence of stages, got {stages!r}")
            check_kind(argument, stages, Iterable, "a sequence of stages")
            for stage in stages:
                if stage not in names:
                    raise ValueError(f"{argument} must name stages of {list(names)}, got {stage!r}")
        for name, visits in self.max_visits.items():
            whole_number(f"max_visits[{name!r}]", visits, 1)
        for name, pair in self.tags.items():
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not all(isinstance(tag, str) for tag in pair):
                raise ValueError(f"tags[{name!r}] must be an opening and a closing tag, got {pair!r}")
        if not all(self.all_tags) or len(set(self.all_tags)) < len(self.all_tags):
            raise ValueError(f"tags must be distinct and not empty, got {self.all_tags}")
        for name in names:
            if not self._reaches_an_end(name):
                raise ValueError(f"follows must lead from every stage to one without followers, got none from {name!r}")

    @classmethod
    def sequence(cls, *names: str, **settings: Unpack[_Settings]) -> "Grammar":
        """Return the grammar that has every stage once, in this order.

        Raises:
            ValueError: a name is given twice. ``max_visits`` is for stages that come again.
        """
        if len(set(names)) < len(names):
            raise ValueError(f"names must be different, got {list(names)}")
        return cls({name: names[at + 1 : at + 2] for at, name in enumerate(names)}, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain JSON, with every tag spelled out.

        ``Grammar(**grammar.to_dict())`` is an equivalent grammar.
        """
        return {
            "follows": {str(name): [str(after) for after in self.follows[name]] for name in self.names},
            "start": [str(name) for name in self.allowed([])],
            "max_visits": {str(name): int(visits) for name, visits in self.max_visits.items()},
            "tags": {str(name): list(self.tag_pair(name)) for name in self.names},
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.follows)

    @property
    def conclusion(self) -> str:
        """The stage whose text is the answer."""
        return [name for name, after in self.follows.items() if not after][-1]

    @property
    def close_tags(self) -> list[str]:
        return [self.tag_pair(name)[1] for name in self.names]

    @property
    def all_tags(self) -> list[str]:
        """The opening and the closing tag of every stage."""
        return [tag for name in self.names for tag in self.tag_pair(name)]

    def tag_pair(self, name: str) -> tuple[str, str]:
        """Return the opening and the closing tag of a stage."""
        open_tag, close_tag = self.tags.get(name, (f"<{name}>", f"</{name}>"))
        return open_tag, close_tag

    def allowed(self, path: Sequence[str]) -> tuple[str, ...]:
        """Return the stages that may come after those of ``path``. If there are none, the answer ends here."""
        after = self.follows[path[-1]] if path else self.start or self.names[:1]
        return tuple(name for name in after if path.count(name) < self.max_visits.get(name, 1))

    def parse(self, text: str) -> dict[str, StageText]:
        """Return every stage of ``text`` by name, in the order of the grammar. Never raises.

        The text of an unclosed stage runs to the next tag of the grammar or to the end. That of a missing stage is
        empty. If a stage occurs several times, as ``max_visits`` allows, the last one counts.
        """
        return {name: self._parse_stage(text, name) for name in self.names}

    def violation(self, text: str) -> str | None:
        """Say in words where ``text`` leaves the grammar. Return None if it does not."""
        path: list[str] = []
        inside = None
        opens, closes = ({self.tag_pair(name)[side]: name for name in self.names} for side in (0, 1))
        pattern = "|".join(sorted(map(re.escape, [*opens, *closes]), key=len, reverse=True))
        for tag in re.findall(pattern, text):
            name = opens.get(tag) or closes[tag]
            if tag in closes:
                if inside != name:
                    return f"{tag} closes what is not open" + (f": {inside} is" if inside else "")
                path.append(name)
                inside = None
            elif inside:
                return f"{tag} opens inside {inside}"
            elif name not in self.allowed(path):
                return self.expected(path, tag)
            else:
                inside = name
        if inside:
            return f"{inside} is not closed"
        return self.expected(path, "the end") if self.allowed(path) else None

    def expected(self, path: Sequence[str], got: str) -> str:
        """Say that ``got`` may not come after ``path``, and what may."""
        after, allowed = f"after {path[-1]}" if path else "first", self.allowed(path)
        return f"{after} comes {' or '.join(allowed) if allowed else 'nothing'}, got {got}"

    def _reaches_an_end(self, name: str) -> bool:
        seen, waiting = set[str](), [name]
        while waiting:
            after = self.follows[waiting.pop()]
            if not after:
                return True
            waiting += set(after) - seen
            seen |= set(after)
        return False

    def _parse_stage(self, text: str, name: str) -> StageText:
        open_tag, close_tag = self.tag_pair(name)
        _, opened, rest = text.partition(open_tag)
        if not opened:
            return StageText(name, "", Outcome.MISSING)
        bodies = rest.split(open_tag)
        is_repeated = len(bodies) > self.max_visits.get(name, 1)
        body, closed, _ = bodies[0 if is_repeated else -1].partition(close_tag)
        if not closed:
            body = body[: min((at for tag in self.all_tags if (at := body.find(tag)) >= 0), default=None)]
        outcome = Outcome.REPEATED if is_repeated else Outcome.COMPLETE if closed else Outcome.UNCLOSED
        return StageText(name, body.strip(), outcome)


LLAVA_COT = Grammar.sequence(*STAGES)  # SUMMARY, CAPTION, REASONING, CONCLUSION


def parse(text: str) -> dict[str, StageText]:
    """Return the four stages of ``text`` by name, as ``LLAVA_COT.parse`` does."""
    return LLAVA_COT.parse(text)


def render(stages: dict[str, str]) -> str:
    """Write the four stages as one tagged text, as in LLaVA-CoT-100k."""
    pairs = ((LLAVA_COT.tag_pair(stage), stages[stage]) for stage in STAGES)
    return "\n\n".join(f"{open_tag} {text} {close_tag}" for (open_tag, close_tag), text in pairs)
