"""The stage grammar: which tags may come in which order, and how a text follows them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, TypedDict, Unpack

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
    opened: str | None
    turns: Mapping[str, str]


class Stop(NamedTuple):
    """A string that ends a stage: a closing tag, or a heading, which ends whatever stands before it."""

    text: str
    closes: str | None  # the stage whose closing tag it is
    opens: str | None  # the stage whose heading it is


class Part(NamedTuple):
    """A stage where it stands in a text."""

    name: str
    start: int  # of its body, behind its opening tag
    end: int
    closed: bool


@dataclass(frozen=True)
class Grammar:
    """Which stages a model writes and which may come after which.

    One follower fixes the order. Among several followers the tag that the model closes decides. A follower that
    leads back to an earlier stage makes a loop. An answer begins with a stage of ``start`` and ends with a stage that
    has no followers. The last such stage in ``follows`` is the conclusion.

    A tag may be the empty string. A stage without an opening tag begins where the one before it ends. A stage without a
    closing tag ends where a follower opens, whose tag is then a heading, or with the end of the answer (EOS) if it has
    no followers. Text between two tagged stages belongs to neither.

    A stage of ``turns`` is a reply of its own in one chat: the user's turn asks for it, and it has no tags. The stage
    before it ends with EOS and has no closing tag and no other follower. In the text of an answer the user's turn
    stands before the reply as its heading, between blank lines (``asked``). If the first stage has a turn, that is
    written behind the question, on a line of its own (``question``).

    Args:
        follows: for each stage the stages that may come next, in the order of preference.
        start: the stages that may come first; by default the first one in ``follows``.
        max_visits: how often a stage may occur in one answer; by default once.
        tags: the opening and the closing tag of a stage; by default ``<NAME>`` and ``</NAME>``.
        opened: the stage whose opening tag the prompt has written already, as some chat templates do with ``<think>``.
            A model that writes it once more does not leave the grammar.
        turns: for a stage the text of the user's turn that asks for it.

    Raises:
        ValueError: no stage, a name that is no stage, ``max_visits`` below 1, no pair of tags, two equal tags, a stage
            from which no end can be reached, or one whose end can't be told: it has neither a closing tag nor followers
            that all have an opening tag. A turn that is empty, or that can't be asked where its stage stands.
        TypeError: an argument of another type.
    """

    follows: Mapping[str, Sequence[str]]
    start: Sequence[str] = ()
    max_visits: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    opened: str | None = None
    turns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("follows", "max_visits", "tags", "turns"):
            check_kind(argument, getattr(self, argument), Mapping, "a mapping whose keys are stages")
        names = self.names
        for name in names:
            check_kind("follows", name, str, "a mapping whose keys are names of stages")
        if not names:
            raise ValueError("follows must have at least one stage, got none")
        mentioned = {"start": self.start, "max_visits": self.max_visits, "tags": self.tags}
        mentioned["turns"] = self.turns
        mentioned |= {f"follows[{str(name)!r}]": after for name, after in self.follows.items()}
        mentioned["opened"] = [] if self.opened is None else [self.opened]
        for argument, stages in mentioned.items():
            if isinstance(stages, str):
                raise ValueError(f"{argument} must be a sequence of stages, got {stages!r}")
            check_kind(argument, stages, Iterable, "a sequence of stages")
            for stage in stages:
                if stage not in names:
                    raise ValueError(f"{argument} must name stages of {list(names)}, got {stage!r}")
        for name, visits in self.max_visits.items():
            whole_number(f"max_visits[{name!r}]", visits, 1)
        self._check_tags()
        for name in names:
            if not self._reaches_an_end(name):
                raise ValueError(f"follows must lead from every stage to one without followers, got none from {name!r}")

    def _check_turns(self) -> None:
        first = self._first
        for name, turn in self.turns.items():
            if not isinstance(turn, str) or not turn.strip():
                raise ValueError(f"turns[{name!r}] must be what the user says, got {turn!r}")
            if tuple(self.tags.get(name, ("", ""))) != ("", ""):
                raise ValueError(f"tags[{name!r}] must be absent for a stage with a turn, got {self.tags[name]!r}")
            if name in first and (len(first) > 1 or self.opened is not None):
                raise ValueError(f"turns[{name!r}] must ask for the only stage that may come first, got {first}")
            before = [other for other, after in self.follows.items() if name in after]
            if name in first and before:
                raise ValueError(f"turns[{name!r}] must ask for a stage that comes first or later, got both")
            for other in before:
                if len(self.follows[other]) > 1:
                    got = list(self.follows[other])
                    raise ValueError(f"follows[{other!r}] must be one stage, since a turn asks for it, got {got}")
                if self.tag_pair(other)[1]:
                    raise ValueError(
                        f"tags[{other!r}] must have no closing tag, since EOS ends it, got {self.tag_pair(other)[1]!r}"
                    )

    def _check_tags(self) -> None:
        for name, pair in self.tags.items():
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not all(isinstance(tag, str) for tag in pair):
                raise ValueError(f"tags[{name!r}] must be an opening and a closing tag, got {pair!r}")
        self._check_turns()
        if len(set(self._marks)) < len(self._marks):
            raise ValueError(f"tags must be distinct, got {self._marks}")
        if self.opened is not None and self.opened not in self._first:
            raise ValueError(f"opened must be a stage that may come first, got {self.opened!r}")
        for name, after in self.follows.items():
            missing = [other for other in after if not self.tag_pair(other)[0]]
            if after and missing and not self.tag_pair(name)[1]:
                raise ValueError(
                    f"tags[{name!r}] must have a closing tag, since its follower {missing[0]!r} has no opening tag"
                )
        first = () if self.opened is not None else self._first
        for names in (first, *(after for name, after in self.follows.items() if self.tag_pair(name)[1])):
            headed = next((name for name in names if self.tag_pair(name)[0] and not self.tag_pair(name)[1]), None)
            if headed is not None and (len(names) > 1 or headed in self.follows[headed]):
                # What the model writes first may be this heading, or another stage, or a second one of the same stage.
                raise ValueError(
                    f"tags[{headed!r}] must have a closing tag, or {headed!r} must be the only stage that may stand "
                    f"there and not follow itself, got {list(names)}"
                )
        for names in (self._first, *self.follows.values()):
            ends = [name for name in names if self.tag_pair(name) == ("", "")]
            if len(ends) > 1:
                raise ValueError(f"tags must tell {ends[0]!r} and {ends[1]!r} apart, got none for either")

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
            "tags": {str(n): ["", ""] if n in self.turns else list(self.tag_pair(n)) for n in self.names},
            "opened": self.opened and str(self.opened),
            "turns": {str(name): turn for name, turn in self.turns.items()},
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.follows)

    @property
    def _first(self) -> Sequence[str]:
        """The stages of ``start``."""
        return self.start or self.names[:1]

    @property
    def conclusion(self) -> str:
        """The stage whose text is the answer."""
        return [name for name, after in self.follows.items() if not after][-1]

    @cached_property
    def stops(self) -> tuple[Stop, ...]:
        """The strings that end a stage: all closing tags in the order of the stages, then all headings."""
        closing = [Stop(self.tag_pair(name)[1], name, None) for name in self.names if self.tag_pair(name)[1]]
        headed = {other for name, after in self.follows.items() if not self.tag_pair(name)[1] for other in after}
        headed -= {*self.turns}  # the user writes those
        return (*closing, *(Stop(self.tag_pair(name)[0], None, name) for name in self.names if name in headed))

    @property
    def all_tags(self) -> list[str]:
        """The opening and the closing tag of every stage, where the model writes one."""
        return [tag for name in self.names if name not in self.turns for tag in self.tag_pair(name) if tag]

    @property
    def _marks(self) -> list[str]:
        """All tags, and the user's turns as they stand in a text."""
        return [mark for name in self.names for mark in self.tag_pair(name) if mark]

    def tag_pair(self, name: str) -> tuple[str, str]:
        """Return the opening and the closing tag of a stage. The opening tag of a user's turn is ``asked``."""
        if name in self.turns:
            return "" if name in self._first else asked(self.turns[name]), ""
        open_tag, close_tag = self.tags.get(name, (f"<{name}>", f"</{name}>"))
        return open_tag, close_tag

    def allowed(self, path: Sequence[str]) -> tuple[str, ...]:
        """Return the stages that may come after those of ``path``. If there are none, the answer ends here."""
        after = self.follows[path[-1]] if path else self._first
        return tuple(name for name in after if path.count(name) < self.max_visits.get(name, 1))

    def first(self) -> tuple[str, ...]:
        """Return the stages that an answer may begin with, which is one if the prompt has opened it."""
        return self.allowed([]) if self.opened is None else (self.opened,)

    def ended_by(self, stop: Stop, path: Sequence[str], among: Sequence[str]) -> str | None:
        """Return which of the stages ``among``, which may come after ``path``, ends where ``stop`` does, if any."""
        if stop.closes is not None:
            return stop.closes if stop.closes in among else None
        open_ended = (name for name in among if not self.tag_pair(name)[1])
        return next((name for name in open_ended if stop.opens in self.allowed([*path, name])), None)

    def ended_by_eos(self, among: Sequence[str]) -> str | None:
        """Return which of the stages ``among`` ends with EOS, if any: a last one, or one before a user's turn."""
        ends = (name for name in among if not self.tag_pair(name)[1])
        return next((name for name in ends if not self.follows[name] or self.follows[name][0] in self.turns), None)

    def next_turn(self, path: Sequence[str]) -> str | None:
        """Return the stage that the user's turn asks for after the stages of ``path``, if one does."""
        return next((name for name in self.allowed(path) if name in self.turns), None) if path else None

    def question(self, question: str) -> str:
        """Return a question as the user asks it, with the turn of the first stage if it has one."""
        (first, *_) = self.allowed([])
        return f"{question}\n{self.turns[first]}" if first in self.turns else question

    def parse(self, text: str, *, ended: bool = True) -> dict[str, StageText]:
        """Return every stage of ``text`` by name, in the order of the grammar. Never raises.

        The text of an unclosed stage runs to the next tag of the grammar or to the end. That of a missing stage is
        empty. If a stage occurs several times, as ``max_visits`` allows, the last one counts.

        Args:
            ended: whether the answer ended by itself. One that was cut has not closed a stage without a closing tag.
        """
        parts: dict[str, list[Part]] = {name: [] for name in self.names}
        for part in self.parts(text, ended=ended):
            parts[part.name].append(part)
        return {name: self._stage_text(name, text, found) for name, found in parts.items()}

    def conclusion_of(self, text: str, stages: Mapping[str, StageText]) -> StageText:
        """Return the answer in ``text``, whose ``stages`` are those that ``parse`` found: that of the conclusion.

        A text in which no stage was opened at all, as of a model that answers plainly, is the answer itself; the
        outcome is missing all the same. A text with stages but without a conclusion has no answer.
        """
        if all(stage.outcome is Outcome.MISSING for stage in stages.values()):
            return StageText(self.conclusion, text.strip(), Outcome.MISSING)
        return stages[self.conclusion]

    def body(self, text: str, name: str) -> str:
        """Return the stripped text of one candidate of a stage, without its tags and what stands before or behind."""
        open_tag, close_tag = self.tag_pair(name)
        at = text.find(open_tag)
        if at < 0 and close_tag and name != self.opened:
            return ""
        # Another heading of the same stage, which is what ends this candidate, has text before it.
        has_opened = at >= 0 and (bool(close_tag) or not text[:at].strip())
        rest = text[at + len(open_tag) :] if has_opened else text
        ends = [close_tag] if close_tag else [stop.text for stop in self.stops if stop.opens in self.follows[name]]
        found = [at for tag in ends if (at := rest.find(tag)) >= 0]
        return rest[: min(found, default=len(rest))].strip()

    def parts(self, text: str, *, ended: bool = True) -> list[Part]:
        """Find the stages of a text, in whatever order they stand.

        A stage with an opening tag is open from there to its closing tag, whatever stands between. One without begins
        where the grammar lets it begin: at the start, or where the stage before it ends.
        """
        parts, path = list[Part](), list[str]()
        opens, closes = self._by_tag
        begin = self._begin(text)
        at: dict[str, int] = {} if self.opened is None else {self.opened: begin}  # the stages that are open
        free = None if at else 0  # where a stage without an opening tag begins, if one may

        def close(name: str, end: int, closed: bool = True) -> None:
            parts.append(Part(name, at.pop(name), end, closed))
            if closed:
                path.append(name)

        for found in self._tag_pattern.finditer(text, begin):
            tag, start = found[0], found.start()
            if (name := closes.get(tag)) is not None:
                if name not in at and free is not None and name in self._begun(path):
                    at[name] = free
                if name in at:
                    close(name, start)
                    free = found.end()
                continue
            name = opens[tag]
            begun = self._begun(path) if free is not None and text[free:start].strip() else []
            if (other := self.ended_by(Stop(tag, None, name), path, begun)) is not None:
                assert free is not None
                at[other] = free
            for other in [other for other in at if not self.tag_pair(other)[1]]:
                # A heading ends what has no closing tag.
                close(other, start, closed=self.ended_by(Stop(tag, None, name), path, [other]) is not None)
            if name in at:
                close(name, start, closed=False)
            at[name], free = found.end(), None
        last = None if free is None else self.ended_by_eos(self._begun(path))
        if last is not None and free is not None and text[free:].strip():
            at[last] = free
        for name in [*at]:
            end = self._tag_pattern.search(text, at[name])
            close(name, end.start() if end else len(text), ended and self.ended_by_eos([name]) is not None)
        return sorted(parts, key=lambda part: part.start)

    def starts(self, text: str) -> list[tuple[int, str]]:
        """Return where the stages of a text start, at their opening tag if they have one, in the order of the text."""
        found = [(part.start - len(self._tag_before(text, part)), part.name) for part in self.parts(text)]
        return sorted(found)

    def violation(self, text: str, *, ended: bool = True) -> str | None:
        """Say in words where ``text`` leaves the grammar. Return None if it does not. See ``parse`` for ``ended``."""
        path: list[str] = []
        inside, since = self.opened, self._begin(text)
        opens, closes = self._by_tag
        for found in self._tag_pattern.finditer(text, since):
            tag = found[0]
            begun = self._begun(path) if inside is None else []
            if tag in closes:
                name = closes[tag]
                if inside != name and name not in begun:
                    return f"{tag} closes what is not open" + (f": {inside} is" if inside else "")
                path.append(name)
                inside = None
            else:
                name = opens[tag]
                is_blank = not text[since : found.start()].strip()
                within = begun if inside is None and not is_blank else [inside] if inside is not None else []
                ended_here = self.ended_by(Stop(tag, None, name), path, within)
                if ended_here is not None:
                    path.append(ended_here)
                elif within:
                    return f"{tag} opens inside {within[0]}"
                elif name not in self.allowed(path):
                    return self.expected(path, tag)
                inside = name
            since = found.end()
        if inside is None and text[since:].strip():
            inside = self.ended_by_eos(self._begun(path))
        if inside is not None:
            if not ended or self.ended_by_eos([inside]) is None:
                return f"{inside} is not closed"
            path.append(inside)
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

    @cached_property
    def _by_tag(self) -> tuple[dict[str, str], dict[str, str]]:
        """The stage of each opening tag and of each closing tag."""
        opens, closes = ({self.tag_pair(name)[side]: name for name in self.names} for side in (0, 1))
        return {tag: name for tag, name in opens.items() if tag}, {tag: name for tag, name in closes.items() if tag}

    @cached_property
    def _tag_pattern(self) -> re.Pattern[str]:
        """The tags, of which the longest is found."""
        tags = sorted(map(re.escape, self._marks), key=len, reverse=True)
        return re.compile("|".join(tags) or "(?!)")

    def _begun(self, path: Sequence[str]) -> list[str]:
        """Return the stages without an opening tag that may come after ``path``: one of them has begun there."""
        return [name for name in self.allowed(path) if not self.tag_pair(name)[0]]

    def _begin(self, text: str) -> int:
        """Return where the body of the stage begins that the prompt has opened: behind its tag if that is there too."""
        tag = self.tag_pair(self.opened)[0] if self.opened is not None else ""
        before = len(text) - len(text.lstrip())
        return before + len(tag) if tag and text.startswith(tag, before) else 0

    def _stage_text(self, name: str, text: str, parts: Sequence[Part]) -> StageText:
        if not parts:
            return StageText(name, "", Outcome.MISSING)
        is_repeated = len(parts) > self.max_visits.get(name, 1)
        part = parts[0 if is_repeated else -1]
        outcome = Outcome.REPEATED if is_repeated else Outcome.COMPLETE if part.closed else Outcome.UNCLOSED
        body = text[part.start : part.end]
        if not part.closed and (tag := self._tag_pattern.search(body)):
            body = body[: tag.start()]
        return StageText(name, body.strip(), outcome)

    def _tag_before(self, text: str, part: Part) -> str:
        open_tag = self.tag_pair(part.name)[0]
        return open_tag if open_tag and text[: part.start].endswith(open_tag) else ""


def asked(turn: str) -> str:
    """Return how a user's turn stands in the text of an answer: between blank lines. Without a turn it is empty."""
    return f"\n\n{turn}\n\n" if turn else ""


LLAVA_COT = Grammar.sequence(*STAGES)  # SUMMARY, CAPTION, REASONING, CONCLUSION


def parse(text: str) -> dict[str, StageText]:
    """Return the four stages of ``text`` by name, as ``LLAVA_COT.parse`` does."""
    return LLAVA_COT.parse(text)


def render(stages: dict[str, str]) -> str:
    """Write the four stages as one tagged text, as in LLaVA-CoT-100k."""
    pairs = ((LLAVA_COT.tag_pair(stage), stages[stage]) for stage in STAGES)
    return "\n\n".join(f"{open_tag} {text} {close_tag}" for (open_tag, close_tag), text in pairs)
