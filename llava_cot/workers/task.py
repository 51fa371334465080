"""What workers exchange with those who give them work: plain data that can be sent to another machine. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llava_cot.core import Bos

if TYPE_CHECKING:
    from llava_cot.image import ImageLike


@dataclass(frozen=True)
class ModelSettings:
    """How a worker loads its model and which search it runs; every field can be sent to another machine.

    Attributes:
        model: a folder, a hub name or the name of a bundled model, as ``SwiresGenerator.from_pretrained`` takes it. On
            several machines a folder must be there on each.
        settings: fields of the search's configuration.
        scorer: the name of a scorer; "verifier", which belongs to the bundled world; or "reward:FOLDER", a reward
            model. None is the search's default.
    """

    model: str
    search: str = "swires"
    settings: Mapping[str, Any] = field(default_factory=dict)
    scorer: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    grammar: str | None = None
    system: str | None = None
    bos: Bos = "one"


@dataclass(frozen=True)
class Task:
    """One question to answer. ``key`` names it to whoever gave it."""

    key: tuple[str, int]
    question: str | Sequence[Mapping[str, Any]]  # or a conversation, see ``llava_cot.prompt.Question``
    images: "tuple[ImageLike, ...]"
    seed: int


@dataclass(frozen=True)
class Reply:
    """The answer to a task.

    Attributes:
        conclusion: what was extracted from ``text``, see ``llava_cot.stages.Grammar.conclusion_of``.
        outcome: how the conclusion was written, a ``llava_cot.stages.Outcome``.
        usage: ``llava_cot.core.Usage`` as a mapping, and "retraces".
        trace: everything that the search did, as ``llava_cot.trace.Trace`` holds it.
        ended: whether the text ended by itself, and was not cut at the limit of tokens.
    """

    text: str
    conclusion: str
    outcome: str
    usage: Mapping[str, Any]
    trace: Mapping[str, Any]
    ended: bool


class WorkerDied(Exception):
    """The process of a worker ended while it had the task, which may have been the cause or not."""


class Workers(Protocol):
    """One or more workers, each with a model of its own, that answer several tasks at once."""

    def has_room(self, alone: bool) -> bool:
        """Whether another task may be started; ``alone`` if it is to have a worker to itself."""

    def start(self, task: Task, alone: bool = False) -> None:
        """Give a task to a worker that has room for it. It never raises what the task is the cause of."""

    def wait(self) -> Iterator[tuple[Task, Reply | Exception]]:
        """Wait until some tasks have ended, and yield each with its reply or with what went wrong."""

    def close(self) -> None:
        """Cancel what runs and give everything back."""
