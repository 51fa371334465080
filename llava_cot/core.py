"""The plain data that searches and back ends exchange: requests, continuations, and what they cost.

Nothing here knows about torch, pages or a model. A policy yields requests; whatever runs the model answers them with
continuations. The same policy therefore runs on the local engine, on a remote server and on scripted answers in a test.
"""

import reprlib
from collections.abc import Callable, Collection, Generator, Iterable, Sequence, Sized
from dataclasses import dataclass, fields
from enum import StrEnum
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Protocol, TypeVar, get_args

Bos = Literal["one", "released"]  # BOS tokens at the start of a prompt: the released weights were trained with two


FLOAT32_MAX, FLOAT32_LEAST = (2 - 2**-23) * 2.0**127, 2.0**-126  # sampling parameters are float32

KINDS: dict[Any, type] = {int: Integral, float: Real, bool: bool, str: str}  # numpy's numbers are numbers too


class Finish(StrEnum):
    """Why a continuation stopped growing."""

    TAG = "tag"  # a stop tag closed
    EOS = "eos"
    LENGTH = "length"  # max_new_tokens
    STOPPED = "stopped"  # its request's limit was reached


class Feature(StrEnum):
    """What a back end can do beyond returning text."""

    SEEDS = "seeds"  # equal seeds draw equal tokens
    TOKEN_IDS = "token_ids"
    LOGPROBS = "logprobs"
    ENTROPIES = "entropies"  # entropies and certainties
    EXTEND = "extend"  # reads given tokens, and names the most likely next ones


def check_features(what: str, needed: Collection[Feature], offered: Collection[Feature]) -> None:
    """Check that a back end offers what a search or a scorer needs.

    Raises:
        ValueError: it does not. The message says that ``what`` needs the features that are missing.
    """
    missing = [feature.value for feature in Feature if feature in needed and feature not in offered]
    if missing:
        got = [feature.value for feature in Feature if feature in offered]
        raise ValueError(f"{what} needs a back end with {missing}, got one with {got}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Names and meaning are those of transformers' ``GenerationConfig``.

    ``temperature`` 0 takes the most likely token; ``top_k`` 0 turns that filter off.

    Raises:
        ValueError: a value out of its range.
        TypeError: a value that is no number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, ok, bound in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("temperature", self.temperature < float("inf"), "finite"),
            ("temperature", self.temperature <= FLOAT32_MAX, "finite in float32"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_k", self.top_k < 2**63, "< 2**63"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_p", self.top_p >= FLOAT32_LEAST, f"at least {FLOAT32_LEAST}, the least normal float32"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {bound}, got {getattr(self, name)}")


@dataclass
class Usage:
    """What a search cost. A token that is recomputed because its pages were evicted counts as recomputed only."""

    prompt_tokens: int = 0  # tokens prefilled, including those that a scorer gave the model to read
    recomputed_tokens: int = 0
    decoded_tokens: int = 0  # tokens computed after the prefill, including drafts that were rejected
    drafted_tokens: int = 0  # tokens computed as drafts, before they were drawn
    accepted_tokens: int = 0  # drafts that were then drawn, by each candidate: each saved it a forward pass
    shared_tokens: int = 0  # tokens that were not computed, since a candidate with the same tokens was
    generated_tokens: int = 0  # tokens drawn
    generations: int = 0  # candidates drawn
    image_encodings: int = 0
    scorer_calls: int = 0  # candidates given to a scorer
    steps: int = 0  # forward passes this search took part in
    seconds: float = 0.0  # from its prefill to its end, without the time that it was paused


@dataclass(frozen=True)
class Limit:
    """Values of ``Usage`` at which growth stops; None is no limit. The back end checks them after every step."""

    generated_tokens: float | None = None
    generations: float | None = None
    prompt_tokens: float | None = None
    image_encodings: float | None = None
    scorer_calls: float | None = None
    seconds: float | None = None

    def reached(self, usage: Usage) -> str | None:
        """The name of the first limit that ``usage`` has reached, or None."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and getattr(usage, field.name) >= value:
                return field.name
        return None


@dataclass(frozen=True)
class Continuation:
    """Tokens that follow those of ``parent``, as a policy, a scorer and the trace see them.

    ``id`` names it within its session, and requests grow it by that id. A record with id -1 was put together by the
    policy itself; nothing can grow from it.
    """

    id: int
    parent: int
    tokens: tuple[int, ...] = ()
    text: str = ""  # tags included
    logprobs: tuple[float, ...] = ()  # of each token under the model, in nats
    sampling_logprobs: tuple[float, ...] = ()  # under the filtered distribution that was drawn from, in nats
    entropies: tuple[float, ...] = ()  # of the model's distribution at each token, in nats
    certainties: tuple[float, ...] = ()  # KL(uniform, the model's distribution) at each token, in nats
    finish: Finish | None = None  # None if its tokens were given
    tag: int = -1  # the stop tag that closed
    seed: int = 0
    top: tuple[tuple[int, float], ...] = ()  # the most likely next tokens with their log-probs, the best first
    wanted: tuple[float, ...] = ()  # log-probs of the next tokens that ``Extend.want`` names


def check_kinds(settings: Any) -> None:
    """Check that every number, truth value and string of a dataclass is one, as its annotation says.

    Numbers of other libraries, such as numpy's, become Python's.

    Raises:
        TypeError: one is of another type, such as a number that is given as text.
    """
    for field in fields(settings):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        if not set(kinds) <= {*KINDS, type(None)}:
            continue  # its own check knows more
        value = getattr(settings, field.name)
        allowed = [KINDS.get(kind, kind) for kind in kinds]
        if not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"{field.name} must be {wanted}, got {value!r}")
        if isinstance(value, Real) and not isinstance(value, (int, float)):
            object.__setattr__(settings, field.name, int(value) if isinstance(value, Integral) else float(value))


def check_kind(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Check that ``value`` is an instance of ``kind``, a type or a tuple of types.

    Raises:
        TypeError: it is not. The message says that ``name`` must be ``wanted``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {reprlib.repr(value)}")


def whole_number(name: str, value: Any, least: int) -> int:
    """Return ``value`` as Python's int.

    Raises:
        TypeError: it is no integer; a truth value is none.
        ValueError: it is below ``least``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be int, got {reprlib.repr(value)}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be integers, got {reprlib.repr(values)}")
    values = tuple(values)
    for value in values:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be integers, got {reprlib.repr(value)}")
    return tuple(map(int, values))


@dataclass(frozen=True)
class Expand:
    """A request to sample one continuation of ``parent`` per seed, each until it finishes.

    The reply is the finished continuations in the order of the seeds. ``stops`` are the numbers of the tags that end a
    continuation, or None for all tags. A tag in ``trims`` ends it too, and a token that goes on past such a tag is
    taken back. When ``limit`` is reached, every continuation of this request stops with ``Finish.STOPPED``.

    Raises:
        ValueError: ``max_new_tokens`` below 1, or a seed outside [0, 2**63).
        TypeError: a field of another type.
    """

    parent: int
    seeds: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # of each continuation
    stops: frozenset[int] | None = None
    trims: frozenset[int] = frozenset()
    limit: Limit | None = None

    def __post_init__(self) -> None:
        check_kind("parent", self.parent, Integral, "the id of a continuation")
        (most,) = _integers("max_new_tokens", (self.max_new_tokens,))
        if most < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {most}")
        object.__setattr__(self, "max_new_tokens", most)
        object.__setattr__(self, "seeds", _integers("seeds", self.seeds))
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"seeds must be in [0, 2**63), got {seed}")
        check_kind("params", self.params, SamplingParams, "SamplingParams")
        for name, tags in (("stops", self.stops), ("trims", self.trims)):
            if not (isinstance(tags, frozenset) or (tags is None and name == "stops")):
                raise TypeError(f"{name} must be a frozenset of tags, got {tags!r}")
        check_kind("limit", self.limit, (Limit, type(None)), "a Limit or None")


@dataclass(frozen=True)
class Extend:
    """A request to append given ``tokens`` to ``parent``, in one forward pass beside all others.

    The reply is a list of one continuation with the tokens' log-probs, the ``top`` most likely next tokens, and the
    log-probs of the next tokens in ``want``. Without ``tokens`` it only asks what may come next. ``generated`` says
    that the search chose the tokens as part of an answer (token beams do), so that they count as generated.

    Raises:
        ValueError: a negative ``top``, or a request that asks for nothing.
        TypeError: a parent, a token or a ``top`` that is no integer.
    """

    parent: int
    tokens: tuple[int, ...] = ()
    top: int = 0
    want: tuple[int, ...] = ()
    generated: bool = False

    def __post_init__(self) -> None:
        check_kind("parent", self.parent, Integral, "the id of a continuation")
        for name in ("tokens", "want"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        object.__setattr__(self, "top", *_integers("top", (self.top,)))
        if self.top < 0:
            raise ValueError(f"top must be >= 0, got {self.top}")
        if not (self.tokens or self.top or self.want):
            raise ValueError("tokens must not be empty without top or want, got ()")


@dataclass(frozen=True)
class Release:
    """A request to forget continuations that nothing will be grown from; the reply is an empty list.

    What was grown from them before, or is in the same list of requests, stays.

    Raises:
        TypeError: an id that is no integer.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _integers("ids", self.ids))


@dataclass(frozen=True, eq=False)
class Call:
    """A request for host work: ``function(items)`` returns one result for each item.

    Calls of equal functions by several searches in one step are merged into one call. An exception that the function
    raises is raised in the search that asked.

    Raises:
        TypeError: ``function`` can't be called, or ``items`` is no sequence.
    """

    function: Callable[[list[Any]], Sequence[Any]]
    items: Sequence[Any]

    def __post_init__(self) -> None:
        check_kind("function", self.function, Callable, "callable")
        check_kind("items", self.items, Sized, "a sequence")


Request = Expand | Extend | Release | Call


def requests_of(yielded: Any) -> list[Request]:
    """Return as a list what a program has yielded. A back end checks what is in it.

    Raises:
        TypeError: it is no collection.
    """
    check_kind("what a program yields", yielded, Iterable, "a list of requests")
    return list(yielded)


Result = TypeVar("Result")

# A search as a coroutine: it yields requests, is sent one reply for each of them, and returns a ``Result``.
Program = Generator[Sequence[Request], list[list[Any]], Result]

# One reply for each request; an exception in the place of a ``Call``'s results is raised in the program, which may go
# on. A lone exception says that the session has ended.
Replies = list[Any] | Exception


class Session(Protocol):
    """One prompt on a back end, and everything that grows from it."""

    root: int  # the id of the prompt
    usage: Usage  # live

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt, 0 while it has not been prepared."""

    @property
    def growing(self) -> list[tuple[int, ...]]:
        """The path of each continuation that grows now: all token ids from the end of the prompt to here."""

    def ask(self, requests: Sequence[Request], done: Callable[[Replies], None]) -> None:
        """Ask for ``requests``; ``done`` is called once with their replies, or with what went wrong.

        Raises:
            TypeError, ValueError: a request that no back end could answer, named by its field.
        """

    def close(self) -> None:
        """End the session and cancel whatever still runs; ``done`` is not called any more."""


class Backend(Protocol):
    """Whatever runs a model: it opens sessions, and their searches go on while somebody steps it."""

    @property
    def features(self) -> frozenset[Feature]: ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer. Only searches that read tokens look at them."""

    def open(self, prompt: Any) -> Session:
        """Open a session on a prompt, or on the one that a function returns once the session is asked."""

    def step(self) -> bool:
        """Do a step, or wait for one that is done elsewhere. Returns whether there may be more to do."""

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step until ``is_done()``. Several threads may do so at once."""
