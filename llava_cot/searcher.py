"""What every generator does, wherever its model runs: plan searches, run them, and make answers and traces of them."""

import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence, Set
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, overload

from PIL.Image import Image

from llava_cot.aio import AsyncGenerator
from llava_cot.answer import Answer, Finished
from llava_cot.core import Backend, Bos, Finish, Session, check_kind
from llava_cot.detokenise import Detokeniser
from llava_cot.grammars import GRAMMARS
from llava_cot.image import Images, check_image, images_of, opener
from llava_cot.question import Question, check_question, question_text
from llava_cot.scoring import Calibration
from llava_cot.scoring.scorer import TurnTokens, name_of
from llava_cot.search import Plan, Search, SearchLike, SwiresConfig, make_plan
from llava_cot.search.events import Event
from llava_cot.search.run import SearchRun
from llava_cot.search.sample import Staged
from llava_cot.search.stream import EventStream
from llava_cot.search.tree import Node
from llava_cot.stages import Grammar
from llava_cot.trace import Trace, trace_data


class Searcher(ABC):
    """Answers questions by searches on ``backend``. No torch is needed here.

    A searcher may be called from several threads, and while streams are open. ``aio`` has the same methods for asyncio.

    Attributes:
        grammar: the stages that the model writes.
        calibrations: quantiles of scores, by scorer, that thresholds are looked up in.
        bos: how many BOS tokens a prompt begins with, as traces have it.
        knows_grammar: whether the grammar was given or found, and is not just the whole answer as one stage.
    """

    grammar: Grammar
    calibrations: dict[str, Calibration]
    bos: Bos
    knows_grammar: bool

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """What runs the model."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the model came from, for traces."""

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The versions of what runs the model, by name, for traces."""

    @property
    @abstractmethod
    def weights_sha256(self) -> str | None:
        """The hash of the model's weights, if it is known."""

    @property
    @abstractmethod
    def turn_tokens(self) -> TurnTokens | None:
        """Makes the tokens of a user's turn, where the back end can read given tokens."""

    @abstractmethod
    def prompt(self, images: Sequence[Image], question: Question) -> Any:
        """Return the prompt of a question as the back end takes it."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special tokens other than stage tags. A space at its start is kept."""

    @abstractmethod
    def detokeniser(self) -> Detokeniser | None:
        """What turns the tokens of one continuation into text as they arrive, or None where that can't be told."""

    def open(self, prompt: Any, plan: Plan) -> Session:
        """Open a session of the back end for a search of ``plan``."""
        return self.backend.open(prompt)

    @cached_property
    def aio(self) -> AsyncGenerator:
        """The same methods for asyncio: ``await generator.aio.answer(...)``."""
        return AsyncGenerator(self)

    def answer(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> Answer:
        """Answer one question, which may be about an image, several or none.

        Args:
            image: a path, a PIL image, bytes or anything else that ``llava_cot.image.open_image`` takes, a list of
                such, or None.
            question: a text, or a conversation that ends with a message of the user (``llava_cot.prompt.Question``).
            search: a name of ``llava_cot.search.POLICIES``, its configuration object, or a policy function.
            seed: everything random comes from it, 0 <= seed < 2**63.
            settings: fields of the search's configuration to change, e.g. ``max_new_tokens=512``.

        Raises:
            ValueError, TypeError: naming the argument that is wrong.
            OutOfPages: the KV cache is too small for this search alone.
            Exception: what a scorer or a policy function raised, when that ended the search. Its ``trace`` attribute
                shows how far the search came.
        """
        return self.answer_batch([image], [question], search, seed=seed, **settings)[0]

    @overload
    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[False] = False,
        **settings: Any,
    ) -> list[Answer]: ...

    @overload
    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[True],
        **settings: Any,
    ) -> list[Answer | Exception]: ...

    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: bool = False,
        **settings: Any,
    ) -> list[Answer] | list[Answer | Exception]:
        """Answer many questions as one continuous batch; ``[i]`` equals ``answer(images[i], questions[i], ...)``.

        A search that fails does not touch the others. The first error is raised once all have ended; with
        ``return_exceptions`` each stands where its answer would.
        """
        plan = self.plan(search, **settings)
        runs = self.submit_all(images, questions, plan, seed=seed, return_exceptions=return_exceptions)
        try:
            self.wait(runs)
            return self.answers_of(runs) if return_exceptions else [*map(self.answer_of, runs)]
        finally:
            cancel_all(runs)

    def stream(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> Generator[Event | Finished, None, None]:
        """As ``answer``, but yields events as they happen (``llava_cot.search.events``) and last ``Finished(answer)``.

        Only ``StageFinal`` and ``TextDelta`` carry text that stands; closing the stream frees everything it holds.
        """
        events: list[Event] = []
        plan = self.plan_of_stream(search, **settings)
        run = self.submit(image, question, plan, seed=seed, on_event=events.append)
        try:
            seen = EventStream(run, events, self.detokeniser())
            while not run.done:
                self.backend.step()
                yield from seen.take()
            yield from seen.take()
            yield Finished(self.answer_of(run))
        finally:
            run.cancel()

    # --- What the methods above and below are made of ---

    def plan(self, search: SearchLike = "swires", **settings: Any) -> Plan:
        """Resolve ``search`` and check ``settings``, before anything runs.

        Raises:
            ValueError: naming the argument that is wrong, the feature that the back end lacks, or the chat template
                if it can't ask the grammar's turns.
        """
        plan = make_plan(search, settings, self.grammar)
        plan.check_features(self.grammar, self.backend.features)
        if self.turn_tokens is not None:
            for turn in self.grammar.turns.values():
                self.turn_tokens(turn, ())  # raises if the chat template can't ask it
        if isinstance(plan.config, Staged) and not self.knows_grammar:
            raise ValueError(
                f"grammar must be named for search={plan.name!r}, since neither the chat template nor the tokenizer of "
                f"this model shows which stages it writes: one of {list(GRAMMARS)} or a Grammar, got None"
            )
        if plan.config.needs_calibration and self._calibration_for(plan) is None:
            warnings.warn(
                f"no calibration of scorer {plan.scorer!r} for this model: nothing will be retraced. "
                "Use generator.calibrate(...) or SwiresConfig(cutoff=...)",
                stacklevel=3,
            )
        return plan

    def plan_of_stream(self, search: SearchLike, **settings: Any) -> Plan:
        """As ``plan``, of a search that returns one answer."""
        plan = self.plan(search, **settings)
        if plan.config.num_answers > 1:
            raise ValueError(f"num_return_sequences must be 1 in a stream, got {plan.config.num_answers}")
        return plan

    def submit(
        self,
        image: Images,
        question: Question,
        plan: Plan,
        *,
        seed: int = 0,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> SearchRun:
        """Start a search; it goes on whenever the engine steps. Keep the result: a search that nobody holds ends.

        Images are opened when the search is admitted, and closed again once the model has seen them. An image or a
        question that can't be used is the search's error.
        """
        openers = [*map(opener, images_of(image))]

        def open_all() -> list[Image]:
            return [open() for open in openers]

        # A question that can't be used fails when it is prepared.
        text = question if isinstance(question, str) else question_text(question) if _is_chat(question) else None
        return self.start(lambda: self.prompt(open_all(), question), plan, seed, on_event, text, open_all)

    def submit_all(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        plan: Plan,
        *,
        seed: int = 0,
        return_exceptions: bool = False,
    ) -> list[SearchRun]:
        """``submit`` for each question, of which there must be one for each image.

        Unless ``return_exceptions``, questions and types of images are checked and files are looked for before anything
        is started.

        Raises:
            ValueError, TypeError: naming the argument that is wrong.
        """
        for name, items in (("images", images), ("questions", questions)):
            is_wrong = isinstance(items, (str, bytes, Mapping, Set)) or hasattr(items, "columns")  # of a table
            if is_wrong or not isinstance(items, Collection):
                raise TypeError(f"{name} must be a sequence with one entry for each search, got {reprlib.repr(items)}")
        if len(images) != len(questions):
            raise ValueError(f"questions must have one entry per image={len(images)}, got {len(questions)}")
        if not return_exceptions:
            for image, question in zip(images, questions):
                check_question(question)
                for each in images_of(image):
                    check_image(each)
        runs: list[SearchRun] = []
        try:
            for image, question in zip(images, questions):
                runs.append(self.submit(image, question, plan, seed=seed))
        except BaseException:
            cancel_all(runs)
            raise
        return runs

    def wait(self, runs: Sequence[SearchRun]) -> None:
        """Step the back end until all ``runs`` have ended."""
        self.backend.run_until(lambda: all(run.done for run in runs))

    def answer_of(self, run: SearchRun, node: Node | None = None) -> Answer:
        """The answer of a search that has ended: its best one, or that of ``node``. Raises what the search raised."""
        if error := self.error_of(run):
            raise error
        node = node or run.result[0]
        text = node.path_text()
        ended = node.finish is Finish.EOS
        stages, violation = self.grammar.parse(text, ended=ended), self.grammar.violation(text, ended=ended)
        return Answer(
            text,
            list(node.path_tokens()),
            stages,
            self.trace_of(run, node),
            run.search.usage,
            self.grammar,
            violation,
            ended or node.closed,
        )

    def answers_of(self, runs: Sequence[SearchRun]) -> list[Answer | Exception]:
        """The answer of each search, or in its place what the search raised."""
        return [self.error_of(run) or self.answer_of(run) for run in runs]

    def error_of(self, run: SearchRun) -> Exception | None:
        """What ended a failed search, with the trace of it as its attribute ``trace``; None if it succeeded."""
        if run.error is not None:
            run.error.trace = self.trace_of(run, None)  # type: ignore[attr-defined]
        return run.error

    def trace_of(self, run: SearchRun, node: Node | None) -> Trace:
        """Everything that a search did, so far if it has not ended. ``node`` is the answer, by default the best one.

        The trace of a running search is made between two steps of the engine, in the thread that steps it.
        """
        search, plan = run.search, run.plan
        calibration = search.calibration
        data = trace_data(
            model=self.source,
            versions=self.versions,
            question=search.question,  # None: only its tokens were given
            search=plan.name,
            config=plan.settings(),
            grammar=self.grammar,
            seed=search.seed,
            bos=self.bos,
            calibration={"scorer": calibration.scorer, "data": calibration.data} if calibration else None,
            prompt_tokens=search.session.prompt_tokens,
            **search.to_dict(),
            answer=node.id if node else None,
            answers=[other.id for other in run.result or []],
            usage=search.usage,
            error=run.error,
        )
        return Trace(data)

    def calibrate(
        self, images: Sequence[Images], questions: Sequence[Question], *, data: str, seed: int = 0, **settings: Any
    ) -> Calibration:
        """Measure what scores the candidates of each stage get, use the result from now on and return it.

        ``settings`` are those of a ``SwiresConfig`` of one round: the scorer and the sampling to calibrate for.

        ``data`` names what it was measured on. Save it with ``calibration.save(folder / "swires_calibration.json")``.
        """
        check_kind("data", data, str, "a name of what is measured on")
        config = make_plan(SwiresConfig(max_rounds=1, grammar=self.grammar), settings, self.grammar).config
        assert isinstance(config, SwiresConfig)
        answers = self.answer_batch(images, questions, config, seed=seed)
        scores: dict[str, list[float]] = {str(name): [] for name in self.grammar.names}
        for answer in answers:
            for node in answer.trace.nodes.values():
                if node["closed"] and node["stage"] is not None and node["score"] is not None:
                    scores[node["stage"]].append(node["score"])
        silent = [stage for stage, values in scores.items() if not values]
        if silent:
            raise ValueError(f"calibration needs closed candidates of every stage, got none of {silent[0]} on {data!r}")
        calibration = Calibration.fit(name_of(config.scorer), data, scores, self.weights_sha256)
        self.calibrations[calibration.scorer] = calibration
        return calibration

    def _calibration_for(self, plan: Plan) -> Calibration | None:
        return self.calibrations.get(plan.scorer) if plan.scorer else None

    def _nodes(self, run: SearchRun) -> list[Node]:
        """The nodes that a search returned, the best first. Raises what the search raised."""
        if error := self.error_of(run):
            raise error
        return run.result

    def start(
        self,
        prompt: Any,
        plan: Plan,
        seed: int,
        on_event: Callable[[Event], None] = lambda event: None,
        question: str | None = None,
        load_images: Callable[[], Sequence[Image]] = tuple,
    ) -> SearchRun:
        """Start a search of a prompt, or of those that a function makes once it is admitted."""
        if not isinstance(seed, Integral) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        seed = int(seed)
        session = self.open(prompt, plan)
        search = Search(
            session,
            self.decode,
            seed,
            plan.config.max_new_tokens,
            self._calibration_for(plan),
            on_event,
            self.backend.eos_token_ids,
            self.grammar,
            plan.config.budget,
            question,
            load_images,
            self.turn_tokens,
            self.backend.features,
        )
        return SearchRun(search, plan)


def _is_chat(question: object) -> bool:
    try:
        check_question(question)
    except ValueError:
        return False
    return True


def cancel_all(runs: Sequence[SearchRun]) -> None:
    """Cancel searches; those that have ended stay as they are."""
    for run in runs:
        run.cancel()
