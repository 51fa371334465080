"""Which sessions run and which wait: admission, preemption where pages run out, and giving everything back."""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

from llava_cot.core import Expand, Release
from llava_cot.engine.branch import Branch
from llava_cot.engine.runner import ModelRunner
from llava_cot.engine.session import Job
from llava_cot_kernels.page_pool import OutOfPages

PROMPTS_PER_PREFILL = 16
STEPS_PER_ROUND, BRANCHES_PER_ROUND = 4, 32  # of the canary, between two passes
SHARED_PASS = "the forward pass that this search shared with others"

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Schedule:
    """All open jobs. ``running`` ones have their prompt in the pages, ``waiting`` ones wait for room.

    ``inbox`` may be appended to by any thread at any time; everything else belongs to the thread that steps.
    """

    def __init__(self, runner: ModelRunner, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.runner, self.view, self.pool = runner, runner.view, runner.pool
        self.inbox = deque[Job]()
        self.waiting, self.running = deque[Job](), list[Job]()
        self.jobs = dict[Job, None]()  # every job that was taken in and is not over, in their order
        self._is_crowded = False  # nobody is admitted before somebody has ended
        self._steps = self._looked_at = 0  # of the canary: branches it has looked at since it began with the first

    @property
    def has_work(self) -> bool:
        return bool(self.inbox or self.waiting or self.runnable)

    @property
    def runnable(self) -> list[Job]:
        """The running jobs that take part in a step."""
        return [job for job in self.running if job.is_runnable]

    def take_in(self) -> None:
        """Queue the jobs of the inbox. Those that run already, with all answered so far, just go on."""
        while self.inbox:
            job = self.inbox.popleft()
            self.jobs[job] = None
            if job not in self.running and job not in self.waiting:
                self.waiting.append(job)

    def collect(self) -> None:
        """Give back what closed sessions hold, and sessions that nobody refers to any more."""
        over = [job for job in self.jobs if job.is_over or job.owner is None or job.owner() is None]
        for job in over:
            self._drop(job)
        if over:
            self._free_unowned()
            self._is_crowded = False

    def admit(self) -> None:
        """Prefill waiting jobs, several at once, while there is room."""
        self._admit_fitting()
        if self.waiting and self.running and not self.runnable:
            for job in [*self.running]:  # their owners ask for nothing now, and may never do so again
                self._preempt(job)
            self._is_crowded = False
            self._admit_fitting()

    def _admit_fitting(self) -> None:
        while not (self._is_crowded and self.running) and (jobs := self._fitting()):
            self._admit(jobs)

    def _admit(self, jobs: list[Job]) -> None:
        try:
            self._prefill(jobs)
            self.running += jobs
        except OutOfPages:  # nothing else runs, and this one is alone
            self._fail(jobs[0], self._too_small())
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._take_all(job)
            for job in jobs:  # whose fault it is shows when each is alone
                self._admit([job])

    def advance(self) -> None:
        """Tell the owners of jobs that are ready. They may ask for more, open and close sessions, and step again."""
        self._steps += 1
        if self.runner.canary is not None and self._steps % STEPS_PER_ROUND == 0:
            self._look_around()
        while ready := [job for job in self.jobs if job.is_ready and not job.is_over]:
            for job in ready:
                if job.is_ready and not job.is_over:
                    self._tell(job)
        self.collect()

    def _look_around(self) -> None:
        """Let the canary look at the pages of a few branches in turn, whether a pass reads them or they wait.

        A job with a broken branch ends. No other job reads what only that branch has.
        """
        branches = ((branch, job) for job in self.running for branch in job.branches)
        turn = dict(islice(branches, self._looked_at, self._looked_at + BRANCHES_PER_ROUND))
        self._looked_at = self._looked_at + len(turn) if len(turn) == BRANCHES_PER_ROUND else 0
        for branch, error in self.runner.broken([branch for branch, job in turn.items() if not job.is_calling]).items():
            if turn[branch].error is None:
                self._fail(turn[branch], error)

    def _tell(self, job: Job) -> None:
        if job in self.running:
            job.tick(time.perf_counter())
        job.is_over = job.error is not None
        replies = job.take_replies(self.decode)
        if job.owner is not None and (owner := job.owner()) is not None:
            try:
                owner.tell(replies)
            except Exception:  # of the owner's own function: it is nobody else's
                job.is_over = True
                logger.exception("a session was closed, since what was to receive its replies raised")

    def relieve(self) -> None:
        """Make room: evict what does not grow; if there is nothing, preempt the youngest job. One that is alone ends.

        What is recomputed later shares the pages that it shared before, so a job that ran alone once can do so again.
        """
        if idle := [branch for job in self.running for branch in job.idle()]:
            self.runner.page_out(idle)
            return
        job = next((job for job in reversed(self.running) if not job.is_runnable), self.running[-1])
        if len(self.running) == 1 and job.rebuilt_at != job.usage.steps:
            # Branches that were restored one by one share less than they did; together they share all of it again.
            job.rebuilt_at = job.usage.steps
            self.runner.page_out(job.branches[1:])
        elif len(self.running) == 1:
            self._fail(job, self._too_small())
        else:
            self._preempt(job)
            if job.is_runnable:
                self.waiting.appendleft(job)
        self._is_crowded = True

    def _preempt(self, job: Job) -> None:
        """Take all pages and the image of ``job``; it is prefilled again when it has work and there is room."""
        self._take_all(job)
        job.was_paused = True
        self.running.remove(job)

    def call(self, function: Callable[[], T], callers: list[Job]) -> T:
        """Call ``function`` of the host for ``callers``, which take no part in steps that it does."""
        for job in callers:
            job.is_calling = True
        try:
            return function()
        finally:
            for job in callers:
                job.is_calling = False
                is_placed = job in self.running or job in self.waiting
                if job in self.jobs and job.error is None and not is_placed:
                    self.waiting.append(job)  # it was preempted meanwhile

    def release(self, job: Job, *, is_forked: bool = False) -> None:
        """Carry out the releases that ``job`` asks for: of branches that are to be expanded once those are forked."""
        expanded = {pending.parent for pending in job.pending if isinstance(pending.request, Expand)}
        for pending in job.pending:
            if isinstance(pending.request, Release):
                pending.answer = []
                for branch in (job.by_id[id] for id in pending.request.ids):
                    if not branch.is_released and (is_forked or branch not in expanded):
                        self._forget(job, branch)

    def fail_pass(self, error: Exception) -> None:
        """End every job that took part in a forward pass that raised ``error``."""
        self._fail_together(self.runnable, error, error)

    def fail_all(self, error: BaseException) -> None:
        """End every job that has begun, since the interrupt ``error`` has left them in an unknown state."""
        shown = RuntimeError(f"{SHARED_PASS} was interrupted: {error!r}")
        self._fail_together([job for job in self.jobs if job.is_started], shown, error)

    def _fail_together(self, jobs: list[Job], shown: Exception, cause: BaseException) -> None:
        for job in jobs:
            own = copy.copy(shown)  # each search notes its trace on its own
            own.__cause__ = cause
            job.error, job.slots, job.pending = own, [], []
            job.root.image = -1
            for branch in job.branches:
                branch.seq = -1
        self.running = [job for job in self.running if job.error is None]
        self.waiting = deque(
            job for job in self.jobs if job.is_runnable and job.error is None and job not in self.running
        )
        self._is_crowded = False
        self._free_unowned()

    def _forget(self, job: Job, branch: Branch) -> None:
        branch.is_released, branch.next_logits = True, None
        job.branches.remove(branch)
        self.runner.page_out([branch])

    def _fitting(self) -> list[Job]:
        """The next jobs to prefill: as many as fit with a page for every growing branch, or one if nothing runs."""
        free = self.pool.num_free - sum(job.width for job in self.running)
        found, image_tokens = list[Job](), 0
        while self.waiting and len(found) < PROMPTS_PER_PREFILL:
            job = self.waiting[0]
            try:
                self._check_length(job.load()["input_ids"].shape[1])
            except Exception as error:  # it is nobody else's
                self.waiting.popleft()
                job.error = error
                continue
            free -= self._pages_to_go_on(job)
            is_alone = not (self.running or found)
            if free < 0 and not is_alone:
                break
            image_tokens += self.view.image_tokens(job.load())
            has_room = self.view.images.has_room(image_tokens)
            if not has_room and not is_alone:
                break
            self.waiting.popleft()
            if has_room:
                found.append(job)
                continue
            size = f"{self.view.images.capacity} image tokens"
            job.error = OutOfPages(f"the store of {size} is too small for this image alone: it has {image_tokens}")
            image_tokens = 0
        return found

    def _check_length(self, length: int) -> None:
        most = self.view.max_length
        if most is not None and length >= most:
            raise ValueError(f"the prompt must be shorter than max_position_embeddings={most}, got {length} tokens")

    def _pages_to_go_on(self, job: Job) -> int:
        """Upper bound on the pages that this job needs to make progress."""
        size, root = self.pool.page_size, job.root
        own = sum(-(-(branch.length - root.length) // size) + 1 for branch in job.active() if branch is not root)
        return -(-root.length // size) + own + job.width + 1

    def _prefill(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.is_started = True
        self.runner.prefill([job.root for job in jobs], [job.load() for job in jobs])
        for job in jobs:
            job.resume(time.perf_counter())
            if job.was_paused:
                job.usage.recomputed_tokens += job.root.length
            else:
                job.usage.prompt_tokens += job.root.length
                job.usage.image_encodings += "pixel_values" in job.load()
            for branch in job.branches:
                branch.image = job.root.image

    def _fail(self, job: Job, error: Exception) -> None:
        """Give back what ``job`` holds; its owner is told ``error`` at the end of the step."""
        job.error, job.slots, job.pending = error, [], []
        if job in self.running:
            self.running.remove(job)
        self._take_all(job)

    def _take_all(self, job: Job) -> None:
        """Evict all branches of ``job`` and its image."""
        self.runner.page_out(job.branches)
        job.root.image = -1
        self._free_unowned()

    def _drop(self, job: Job) -> None:
        self.jobs.pop(job, None)
        for jobs in (self.running, self.waiting):
            if job in jobs:
                jobs.remove(job)
        job.drop()

    def _free_unowned(self) -> None:
        """Free what no job owns: also what an interrupt left between its making and its noting."""
        owned = {branch.seq for job in self.jobs for branch in job.branches}
        for seq in self.pool.sequences():
            if seq not in owned:
                self.pool.free(seq)
        images = {job.root.image for job in self.jobs}
        for image in self.view.images.starts():
            if image not in images:
                self.view.images.free(image)

    def _too_small(self) -> OutOfPages:
        size = f"num_pages={self.pool.num_pages} of page_size={self.pool.page_size}"
        return OutOfPages(f"the KV cache ({size}) is too small for this search alone; raise num_pages")
