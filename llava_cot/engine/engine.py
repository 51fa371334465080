"""Continuous batching of searches over one paged KV pool: an engine to which work can be added at any time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral

import torch
from transformers import PreTrainedModel

from llava_cot.core import Call, Expand, Extend, Feature, Finish, Usage
from llava_cot.engine.branch import Branch
from llava_cot.engine.call import call_together
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.drafts import DRAFT_TOKENS, Drafts, SpoiltDraft, drawing, may_draw
from llava_cot.engine.draw import Draw, Row, Run, draw_rows, grow, grow_along
from llava_cot.engine.extend import read_extensions
from llava_cot.engine.follow import state_of
from llava_cot.engine.fused import gather_weights
from llava_cot.engine.graphs import MAX_EOS_TOKEN_IDS, Window
from llava_cot.engine.model import Prompt
from llava_cot.engine.processors import LogitsProcessors
from llava_cot.engine.runner import ModelRunner
from llava_cot.engine.schedule import Schedule
from llava_cot.engine.session import Extension, Job, Pending, Session, Slot
from llava_cot.engine.threads import threads_for
from llava_cot.engine.twins import give_pages, part
from llava_cot_kernels.page_pool import OutOfPages
from llava_cot_kernels.stage_tags import StageTags

CUDA_STEPS_PER_LOOK = 4


class Engine:
    """Runs sessions on an unmodified model.

    ``open`` starts a session, and ``step`` does one forward pass over the last token of every growing branch of every
    session and draws one token for each, or several where drafts were right (``drafts.py``). Sessions may be opened,
    asked and closed at any time and from any thread; one thread steps at a time. Where pages run out, branches that do
    not grow are evicted first; if that is not enough, the youngest session is preempted until another has ended.
    Nothing that was drawn or scored is lost: keys and values are recomputed when they are needed. A session that needs
    too many pages alone ends with ``OutOfPages``.

    Args:
        model: stays as it is, but on CUDA some of its weights move in memory (``fused.py``). The engine runs a copy of
            its module tree that shares every tensor. If the model is changed, the next session gets a new copy.
        tags: the stop tags; their index is a continuation's ``tag``.
        decode: from token ids to text.
    """

    features = frozenset(Feature)

    def __init__(
        self,
        model: PreTrainedModel,
        tags: StageTags,
        decode: Callable[[Sequence[int]], str] = lambda tokens: "",
        config: EngineConfig = EngineConfig(),  # noqa: B008, it is frozen
    ) -> None:
        self._model, self._decode_tokens, self._config, self._given_tags = model, decode, config, tags
        # Held as itself: an interrupt inside of ``Condition.__enter__``, which is Python, would leave it locked.
        self._mutex = threading.RLock()
        self._turn = threading.Condition(self._mutex)
        self._leader: int | None = None  # the thread that steps
        self._is_cut_short = False  # whether a step has begun and not ended
        self._build()

    @torch.inference_mode(False)  # what it allocates is written in any mode
    def _build(self) -> None:
        """Copy the model's module tree, and make everything that depends on it."""
        model, config = self._model, self._config
        gather_weights(model)
        state = state_of(model)
        self.runner = ModelRunner(model, config)
        self.view, self.pool = self.runner.view, self.runner.pool
        self.tags = self._given_tags.to(self.view.device)
        steps_per_look = config.steps_per_look
        if steps_per_look is None:
            steps_per_look = CUDA_STEPS_PER_LOOK if self.view.device.type == "cuda" else 1
        self.window = Window(self.view, self.runner.recorder, self.tags, steps_per_look)
        self.schedule = Schedule(self.runner, self._decode_tokens)
        threads = threads_for(model, self.view.device)
        self.num_threads = config.num_threads or threads
        self.processors = LogitsProcessors(model)
        # Small models spend a step on other things than its rows.
        by_default = DRAFT_TOKENS if threads == 1 or self.view.device.type == "cuda" else 0
        self.drafts = Drafts(by_default if config.draft_tokens is None else config.draft_tokens)
        self._state = state

    def _follow_model(self) -> None:
        """Build everything again if the model has changed: its adapters, parameters, dtype or device."""
        if torch.is_autocast_enabled(self._model.device.type):
            raise TypeError("torch.autocast must be off, since the engine computes in the model's own dtype, got it on")
        if self._config.follow_model and state_of(self._model) != self._state:
            with self._mutex:
                if self._leader is None:
                    self._collect()
                if self.schedule.jobs or self.schedule.inbox:
                    raise RuntimeError("the model must not be changed while searches run on it, but it has been")
                self._build()
        self.processors.follow(self.eos_token_ids, self.view.device)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids of the model's generation config, as it is now, that end an answer.

        Raises:
            ValueError: there are too many of them for the buffers of captured graphs.
            TypeError: one of them is no integer.
        """
        eos = self._model.generation_config.eos_token_id
        if hasattr(eos, "flatten"):  # a tensor or an array
            eos = eos.flatten().tolist()
        ids = frozenset(eos if isinstance(eos, (list, tuple, set)) else [] if eos is None else [eos])
        if not all(isinstance(token, Integral) for token in ids):
            raise TypeError(f"eos_token_id must be int or a list of int, got {eos!r}")
        if len(ids) > MAX_EOS_TOKEN_IDS:
            raise ValueError(f"eos_token_id must have at most {MAX_EOS_TOKEN_IDS} ids, got {len(ids)}")
        return ids

    @property
    def pages_in_use(self) -> int:
        return self.runner.pages_in_use

    @property
    def images_in_use(self) -> int:
        return len(self.view.images.starts())

    @property
    def has_work(self) -> bool:
        """Whether a session waits for an answer."""
        return self.schedule.has_work

    def open(self, prompt: Prompt | Callable[[], Prompt]) -> Session:
        """Open a session on the processor's inputs for one sample, without padding. It is prefilled once it is asked.

        A function is called when the session is admitted, in the thread that steps, so that a thousand waiting sessions
        hold no images. What it raises ends the session. Keep the session: when nobody refers to it any more, its work
        ends.
        """
        self._follow_model()
        job = Job(prompt if callable(prompt) else lambda: prompt, Branch(None, -1, 0, tag_state=self.tags.start_state))
        if not callable(prompt):
            job.load()
        return Session(self, job)

    def take_in(self, job: Job) -> None:
        """Note that ``job`` has requests."""
        self.schedule.inbox.append(job)

    def collect(self) -> None:
        """Give back what closed sessions hold; a step that runs now does so when it ends."""
        with self._mutex:
            if self._leader is None:
                self._collect()

    def _collect(self) -> None:
        """Collect between two steps; if an interrupt cuts this short, the next step sees to it."""
        was_cut_short, self._is_cut_short = self._is_cut_short, True
        self.schedule.take_in()  # or what is closed before its first step would wait for one
        self.schedule.collect()
        self._is_cut_short = was_cut_short

    def step(self) -> bool:
        """Do one step; returns whether there is more to do.

        An exception that is not an ``Exception``, such as ``KeyboardInterrupt``, ends every session that has begun:
        their owners get a ``RuntimeError``. An error of a forward pass is given to the sessions that took part in it.
        """
        self._lead(lambda: False)
        return self.has_work

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step until ``is_done()``. Several threads may do so at once: they take turns, and share forward passes.

        Raises:
            RuntimeError: no session has asked for anything, so that nothing can become done.
        """
        while not is_done():
            self._lead(is_done)
            with self._mutex:
                if self._leader is None and not self.has_work and not is_done():
                    raise RuntimeError("the sessions that are waited for have asked for nothing")

    def _lead(self, is_done: Callable[[], bool]) -> None:
        """Wait for this thread's turn and step, unless ``is_done`` comes first."""
        me = threading.get_ident()
        is_nested = self._leader == me  # a program runs another search inside a step
        threads = torch.get_num_threads()
        try:
            try:
                with self._mutex:
                    while self._leader not in (None, me) and not is_done():
                        self._turn.wait(1.0)
                    if is_done():
                        return
                    self._leader = me
                torch.set_num_threads(min(threads, self.num_threads or threads))
                self._step_once(is_nested)
            except BaseException as error:
                if self._leader == me:
                    self.schedule.fail_all(error)
                    self._is_cut_short = False
                raise
            finally:
                if not is_nested:
                    with self._mutex:
                        if self._leader == me:
                            self._collect()  # what another thread closed after the step had looked
                            self._leader = None
                            self._turn.notify_all()
        finally:
            # An interrupt may have hit the lines above. It can't hit these: Python looks for signals after a call.
            if not is_nested and self._leader == me:
                self._leader = None
            torch.set_num_threads(threads)

    def _step_once(self, is_nested: bool) -> None:
        schedule = self.schedule
        if self._is_cut_short and not is_nested:
            schedule.fail_all(RuntimeError("an earlier step was interrupted"))
        self._is_cut_short = True
        schedule.take_in()
        schedule.collect()
        try:
            schedule.admit()
            self._call()
            drafts = self.drafts.propose(schedule.runnable)
            if drafts or not self._window(schedule.runnable):
                self._decode(drafts)
        except Exception as error:  # such as torch.OutOfMemoryError
            schedule.fail_pass(error)
        schedule.advance()
        self._is_cut_short = is_nested

    def _decode(self, drafts: dict[Branch, list[int]]) -> None:
        """Compute the last token of what grows or is expanded and all tokens of an extension, then draw what comes next
        for everything that grows: one token, or more where they are those of its draft.
        """
        while True:
            running = self.schedule.runnable
            try:
                self._prepare(running)
                logits, sources = self._compute(running, drafts)
                break
            except (OutOfPages, SpoiltDraft):
                if not drafts:
                    self.schedule.relieve()
                drafts = {}
        for job in running:
            job.usage.steps += bool(job.slots or any(pending.parent for pending in job.pending))
            for pending in job.pending:
                if isinstance(pending.request, Expand):
                    job.open(self._within_context(pending), self._fork(job, pending))
                else:
                    job.reply([pending.extension.branch] if pending.extension else pending.answer)
                if pending.extension and pending.extension.is_spoilt:
                    job.error = ValueError("logits must have no NaN, got some behind tokens that were given")
            self.schedule.release(job, is_forked=True)
            job.pending = []
        draws = [draw for job in running for draw in self._draws(job, sources, drafts)]
        if draws:
            if not self.processors.is_empty:
                logits, draws = self._process(running, logits, draws, drafts)
            drawn = dict[Slot, list[Row]]()
            for draw, row in zip(draws, draw_rows(logits, draws, self.tags)):
                drawn.setdefault(draw.slot, []).append(row)
            self._grow(running, drawn, drafts)
            part([slot.branch for slot in drawn], self.pool, 1 + self.drafts.most_tokens)

    def _draws(self, job: Job, sources: dict[Branch | None, int], drafts: dict[Branch, list[int]]) -> Iterator[Draw]:
        for slot in drawing(job):
            computed = slot.branch.twin or slot.branch
            row = sources[computed if computed.tokens else computed.parent]
            yield from Draw.along(slot, row, drafts.get(computed, ()), self.tags)

    def _process(
        self, running: list[Job], logits: torch.Tensor, draws: list[Draw], drafts: dict[Branch, list[int]]
    ) -> tuple[torch.Tensor, list[Draw]]:
        """Apply the logits processors: the logits [N, V] of N draws, and the draws from them."""
        prompt_of = {slot: job.load()["input_ids"] for job in running for slot in job.slots}
        paths = []
        for draw in draws:
            branch = draw.slot.branch
            paths.append(branch.path() + list(drafts.get(branch.twin or branch, ()))[: draw.ahead])
        prompts = [prompt_of[draw.slot] for draw in draws]
        logits = self.processors.apply(logits, [draw.row for draw in draws], prompts, paths)
        return logits, [draw._replace(row=row) for row, draw in enumerate(draws)]

    def _grow(self, running: list[Job], drawn: dict[Slot, list[Row]], drafts: dict[Branch, list[int]]) -> None:
        """Note what all growing branches of ``running`` drew; those that end with it grow no more."""
        now, ends = time.perf_counter(), self.eos_token_ids
        for job in running:
            try:
                for slot in [slot for slot in job.slots if slot in drawn]:
                    draft = drafts.get(slot.branch.twin or slot.branch, [])
                    count = grow(slot, drawn[slot], ends, self.tags, draft)
                    job.usage.generated_tokens += count
                    job.usage.accepted_tokens += count - 1
                    self.drafts.learn(slot, len(draft), count - 1)
            except ValueError as error:
                job.error, job.slots = error, []
            job.tick(now)
            for slot in job.slots:
                branch, limit = slot.branch, slot.request.limit
                if branch.finish is None and limit and limit.reached(job.usage):
                    branch.finish = Finish.STOPPED
                if branch.finish is not None:
                    self.drafts.note(job, branch)
            job.slots = [slot for slot in job.slots if slot.branch.finish is None]

    def _grow_along(self, job: Job, runs: dict[Slot, Run], ends: frozenset[int]) -> None:
        """Note what the growing branches of ``job`` drew in a window, as if it had been noted after every step."""
        if any(slot.request.limit for slot in job.slots):  # which may end them after any step
            for step in range(self.window.num_steps):
                if job.slots:
                    job.usage.steps += 1
                    job.usage.decoded_tokens += len(job.slots)
                    self._grow([job], {slot: [runs[slot].row(step)] for slot in job.slots}, {})
            return
        try:
            counts = [grow_along(slot, runs[slot], ends, self.tags) for slot in job.slots]
        except ValueError as error:
            job.error, job.slots, counts = error, [], []
        job.usage.steps += max(counts, default=0)
        job.usage.decoded_tokens += sum(counts)
        job.usage.generated_tokens += sum(counts)
        job.tick(time.perf_counter())
        finished = [slot for slot in job.slots if slot.branch.finish is not None]
        for slot in sorted(finished, key=lambda slot: runs[slot].drawn):
            self.drafts.note(job, slot.branch)
        job.slots = [slot for slot in job.slots if slot.branch.finish is None]

    def _window(self, running: list[Job]) -> bool:
        """Let all branches grow by several tokens, if that is all there is to do; False if it takes a ``_decode``."""
        slots = [slot for job in running for slot in job.slots]
        if (
            not slots
            or not self.processors.is_empty
            or any(job.pending for job in running)
            or any(slot.branch.twin is None and slot.branch.seq < 0 for slot in slots)
        ):
            return False
        left = [slot.request.max_new_tokens - len(slot.branch.tokens) for slot in slots]
        counts = [min(count, self.window.num_steps) for count in left]
        if max(counts) == 1 or not all(may_draw(job, max(counts)) for job in running):
            return False
        for slot in slots:
            give_pages(slot.branch, self.pool)
        seqs = [slot.branch.seq for slot in slots]
        try:
            slot_mapping = self.runner.append(seqs, counts)
        except OutOfPages:
            return False
        ends = self.eos_token_ids
        self.window.follow(ends)
        runs = dict(zip(slots, self.window.run(slots, counts, slot_mapping, self.pool)))
        for job in running:
            self._grow_along(job, runs, ends)
        for slot in slots:
            if slot.branch.finish is not None:
                self.pool.truncate(slot.branch.seq, slot.branch.length - 1)
        return True

    def _call(self) -> None:
        calls = [
            (job, pending)
            for job in self.schedule.runnable
            for pending in job.pending
            if isinstance(pending.request, Call) and pending.answer is None
        ]
        requests = [pending.request for _, pending in calls]
        results = self.schedule.call(lambda: call_together(requests), [job for job, _ in calls])  # type: ignore[arg-type]
        for _, pending in calls:
            pending.answer = results[pending.request]  # type: ignore[index]

    def _prepare(self, running: list[Job]) -> None:
        """Give pages to what is computed next, and fork the branches that are extended."""
        for job in running:
            job.usage.recomputed_tokens += self.runner.restore(job.active())
            for pending in job.pending:
                if isinstance(pending.request, Extend) and pending.extension is None:
                    pending.extension = self._extend(job, pending)
            self.schedule.release(job)

    def _compute(
        self, running: list[Job], drafts: dict[Branch, list[int]]
    ) -> tuple[torch.Tensor, dict[Branch | None, int]]:
        """The logits to draw from, [R, V], and the row behind the last token of each branch, where a draft goes on.

        Raises ``OutOfPages`` or ``SpoiltDraft`` before anything has changed.
        """
        requests = [(job, pending) for job in running for pending in job.pending]
        opened = [(job, p.parent) for job, p in requests if isinstance(p.request, Expand) and p.parent and p.width]
        extensions = [(job, p.extension) for job, p in requests if p.extension]
        growing = [(job, slot.branch) for job in running for slot in drawing(job)]
        rows = {branch: job for job, branch in growing if branch.twin is None}
        rows |= {branch: job for job, branch in opened if branch.next_logits is None}
        tokens = {branch: branch.tokens[-1:] + drafts.get(branch, []) for branch in rows}
        tokens |= {extension.branch: extension.unread for _, extension in extensions if extension.unread}
        logits = self.runner.decode(tokens) if tokens else None
        if drafts and logits is not None and not logits.amax(-1).isfinite().all():
            for branch, new in tokens.items():
                self.pool.truncate(branch.seq, self.pool.length(branch.seq) - len(new))
            raise SpoiltDraft
        sources, at = dict[Branch | None, int](), 0
        for branch, new in tokens.items():
            at += len(new)
            sources[branch] = at - 1 - len(drafts.get(branch, ()))
        for branch, job in rows.items():
            job.usage.decoded_tokens += len(tokens[branch])
            job.usage.drafted_tokens += len(drafts.get(branch, ()))
        for job, branch in growing:
            job.usage.shared_tokens += branch.twin is not None
        for job, extension in extensions:
            _count(job.usage, extension)
        read_extensions([extension for _, extension in extensions], logits, sources)
        for _, parent in opened:
            if parent.next_logits is None:
                assert logits is not None
                parent.next_logits = logits[sources[parent]].clone()
        parts = [] if logits is None else [logits]
        for _, parent in opened:
            if parent not in sources:
                assert parent.next_logits is not None
                sources[parent] = at
                at += 1
                parts.append(parent.next_logits.unsqueeze(0))
        return torch.cat(parts) if parts else self.view.kv_cache.new_empty(0, self.view.vocab_size), sources

    def _extend(self, job: Job, pending: Pending) -> Extension:
        parent, request = pending.parent, pending.request
        assert parent is not None and isinstance(request, Extend)
        (seq,) = self.pool.fork(parent.seq, 1)
        length = parent.length + len(request.tokens)
        branch = Branch(parent, seq, length, image=parent.image, tag_state=None, tokens=list(request.tokens))
        unread = (parent.tokens[-1:] if parent.next_logits is None else []) + branch.tokens
        return Extension(request, job.add(branch), unread, parent.next_logits, parent.top)

    def _within_context(self, pending: Pending) -> Expand:
        """Return the request with no more new tokens than the model has positions for, but at least one."""
        request, parent, most = pending.request, pending.parent, self.view.max_length
        assert parent is not None and isinstance(request, Expand)
        if most is None or parent.length + request.max_new_tokens <= most:
            return request
        return replace(request, max_new_tokens=max(1, most - parent.length))

    def _fork(self, job: Job, pending: Pending) -> list[Branch]:
        parent, request = pending.parent, pending.request
        assert parent is not None and isinstance(request, Expand)
        # A sentence is looked for in new tokens alone: the parent may end with a full stop whose space was taken back.
        state = self.tags.start_state if request.trims else self._tag_state(parent)
        kids = [
            job.add(Branch(parent, -1, parent.length, image=parent.image, seed=seed, tag_state=state))
            for seed in request.seeds
        ]
        for kid in kids[:1]:
            (kid.seq,) = self.pool.fork(parent.seq, 1)
        for kid in kids[1:]:
            kid.twin = kids[0]
        job.usage.generations += len(kids)
        return kids

    def _tag_state(self, branch: Branch) -> int:
        """The state of the stop tags after ``branch``. Given tokens are followed here, once somebody draws on."""
        unknown, known = list[Branch](), branch
        while known.tag_state is None:
            assert known.parent is not None
            unknown.append(known)
            known = known.parent
        state = known.tag_state
        for given in reversed(unknown):
            for token in given.tokens:
                state, _, _ = self.tags.advance(state, token)
            given.tag_state = state
        return state


def _count(usage: Usage, extension: Extension) -> None:
    if extension.request.generated:
        usage.decoded_tokens += len(extension.unread)
        usage.generated_tokens += len(extension.branch.tokens)
    else:
        usage.prompt_tokens += len(extension.unread)
