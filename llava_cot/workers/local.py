"""A worker in this process: all its searches share forward passes on one model."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llava_cot.generator import SwiresGenerator
from llava_cot.scoring import SCORERS, Scorer
from llava_cot.scoring.reward_model import RewardModelScorer
from llava_cot.search import Plan
from llava_cot.search.run import SearchRun
from llava_cot.workers.names import REWARD, check_scorer_name
from llava_cot.workers.task import ModelSettings, Reply, Task

if TYPE_CHECKING:
    from llava_cot.answer import Answer


class LocalWorker:
    """Answers tasks in this process, ``in_flight`` at most at once.

    Raises:
        ValueError, TypeError: naming the setting that is wrong.
    """

    def __init__(self, settings: ModelSettings, in_flight: int) -> None:
        self.generator, self.plan = load(settings)
        self._in_flight, self._running = in_flight, dict[SearchRun, Task]()
        self._failed: list[tuple[Task, Exception]] = []

    def has_room(self, alone: bool) -> bool:
        return len(self._running) + len(self._failed) < (1 if alone else self._in_flight)

    def start(self, task: Task, alone: bool = False) -> None:
        try:
            run = self.generator.submit(list(task.images), task.question, self.plan, seed=task.seed)
        except Exception as error:  # it can't even be asked
            self._failed.append((task, error))
        else:
            self._running[run] = task

    def wait(self) -> Iterator[tuple[Task, Reply | Exception]]:
        failed, self._failed = self._failed, []
        yield from failed
        if not failed:
            self.generator.engine.run_until(lambda: any(run.done for run in self._running))
        for run in [run for run in self._running if run.done]:
            error = self.generator.error_of(run)
            yield self._running.pop(run), error or reply_of(self.generator.answer_of(run))

    def close(self) -> None:
        for run in self._running:
            run.cancel()
        self._running.clear()


def load(settings: ModelSettings) -> tuple[SwiresGenerator, Plan]:
    """Load the model of the settings and resolve their search."""
    generator = SwiresGenerator.from_pretrained(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        grammar=settings.grammar,
        system=settings.system,
        bos=settings.bos,
    )
    given: dict[str, Any] = dict(settings.settings)
    if settings.scorer is not None:
        given["scorer"] = load_scorer(settings.scorer)
    return generator, generator.plan(settings.search, **given)


def load_scorer(name: str) -> Scorer:
    """Return a scorer by its name, see ``ModelSettings``."""
    check_scorer_name(name)
    if name == "verifier":
        from llava_cot.data.clean_view import CleanView
        from llava_cot.scoring.verifier import load_verifier

        return load_verifier(CleanView())
    if name.startswith(REWARD):
        return RewardModelScorer.from_pretrained(name.removeprefix(REWARD))
    return SCORERS[name]


def reply_of(answer: "Answer") -> Reply:
    """Return the plain data of an answer."""
    stage = answer.grammar.conclusion_of(answer.text, answer.stages)
    usage = asdict(answer.usage) | {"retraces": len(answer.trace.events("retraced"))}
    return Reply(answer.text, stage.text, str(stage.outcome), usage, answer.trace.data, answer.ended)
