"""Which searches run and which wait: their admission, pauses for want of pages, and giving everything back."""

import time
from collections import deque
from collections.abc import Sequence
from weakref import WeakSet

from llava_cot.engine.branch import Branch, Call, Extend, Request
from llava_cot.engine.job import Job
from llava_cot.engine.runner import ModelRunner
from llava_cot_kernels.page_pool import OutOfPages

PROMPTS_PER_PREFILL = 16


class Schedule:
    """The jobs of one run, in their order; ``running`` ones have a prompt in the pages.

    ``live`` are the jobs that own pages, those of other runs on the same pages too.
    """

    def __init__(self, runner: ModelRunner, live: WeakSet[Job], start_state: int, jobs: Sequence[Job]):
        self.runner, self.view, self.pool = runner, runner.view, runner.pool
        self.start_state = start_state  # of the stop tags
        self.waiting, self.running = deque(jobs), list[Job]()
        self._jobs, self._live = jobs, live
        self._is_crowded = False  # nobody is admitted before somebody has ended

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> None:
        """Let go of what was cancelled, and prefill waiting jobs, several at once, while there is room."""
        for job in [job for job in (*self.waiting, *self.running) if job.cancelled]:
            (self.running if job in self.running else self.waiting).remove(job)
            self._release(job)
        while not (self._is_crowded and self.running) and (jobs := self._fitting()):
            try:
                self._prefill(jobs)
                self.running += jobs
            except OutOfPages:  # nothing else runs, and this one is alone
                jobs[0].error = self._too_small()
                self._release(jobs[0])

    def advance(self) -> None:
        """Let the programs go on where nothing grows."""
        for job in [*self.running]:
            if not self._advance(job):
                self.running.remove(job)
                self._release(job)

    def relieve(self) -> None:
        """Make room: take the pages of what does not grow; if there are none, all of the youngest job, which pauses.

        One that is alone ends, or starts again if it was paused before: what is computed again shares fewer pages than
        it did where a ``Rank`` has dropped what it came from.
        """
        if idle := [branch for job in self.running for branch in job.idle()]:
            self.runner.page_out(idle)
            return
        job = self.running.pop()
        if self.running:
            self.runner.page_out([branch for branch in job.branches if branch.seq >= 0])
            job.branches[0].image, job.was_paused = -1, True
            self._free_unowned()
        else:
            job.error = None if job.was_paused else self._too_small()
            self._release(job)
        if not job.error:
            self.waiting.appendleft(job)
        self._is_crowded = True

    def close(self) -> None:
        """Take back everything that the jobs still hold."""
        for job in self._jobs:
            self._release(job)
        self._free_unowned()

    def _fitting(self) -> list[Job]:
        """The next jobs to prefill: as many as fit with a page for every growing branch, or one if nothing runs."""
        free = self.pool.num_free - sum(job.width for job in self.running)
        found, image_tokens = list[Job](), 0
        while self.waiting and len(found) < PROMPTS_PER_PREFILL:
            job = self.waiting[0]
            if job.branches or self._start(job):
                free -= self._pages_to_go_on(job)
                is_alone = not (self.running or found)
                if free < 0 and not is_alone:
                    break
                image_tokens += self.view.image_tokens(job.inputs)
                has_room = self.view.images.has_room(image_tokens)
                if not has_room and not is_alone:
                    break
                if has_room:
                    found.append(self.waiting.popleft())
                    continue
                size = f"{self.view.images.capacity} image tokens"
                job.error = OutOfPages(f"the store of {size} is too small for this image alone: it has {image_tokens}")
                image_tokens = 0
            self._release(self.waiting.popleft())
        return found

    def _start(self, job: Job) -> bool:
        """Begin its program, whose prompt is computed next; False if there is nothing to be done."""
        self._live.add(job)
        job.usage.prompt_tokens += job.prompt_length
        job.usage.image_encodings += 1
        job.start(Branch(None, -1, job.prompt_length, tag_state=self.start_state), time.perf_counter())
        return self._advance(job)

    def _pages_to_go_on(self, job: Job) -> int:
        """At most so many: for the prompt, what grows or is asked for, and a page for each new branch."""
        size, root = self.pool.page_size, job.branches[0]
        own = sum(-(-(branch.length - root.length) // size) + 1 for branch in job.active() if branch is not root)
        return -(-root.length // size) + own + job.width + 1

    def _prefill(self, jobs: list[Job]) -> None:
        self.runner.prefill([job.branches[0] for job in jobs], [job.inputs for job in jobs])
        for job in jobs:
            job.resume(time.perf_counter())
            job.usage.recomputed_tokens += job.prompt_length * job.was_paused
            for branch in job.branches:
                branch.image = job.branches[0].image

    def _advance(self, job: Job) -> bool:
        """False once it has ended, as it does by a request that would fail a whole step."""
        if job.error or not job.advance(time.perf_counter()):
            return False
        try:
            self._check(job)
        except (TypeError, ValueError) as error:
            job.error = error
        return job.error is None

    def _check(self, job: Job) -> None:
        """Raise for what would fail a whole step, and so other jobs."""
        if not job.requests:  # it grows still
            return
        held, size = set(job.branches), self.view.vocab_size
        for request in job.requests:
            if not isinstance(request, Request):
                raise TypeError(f"a program must yield requests, got {request!r}")
            if not isinstance(request, Call) and request.parent not in held:
                raise ValueError("parent must be a branch of this search that has not been dropped")
            if isinstance(request, Extend):
                unknown = [token for token in request.tokens if not 0 <= token < size]
                if unknown:
                    raise ValueError(f"tokens must be in [0, vocab_size={size}), got {unknown[0]}")

    def _release(self, job: Job) -> None:
        """Take back everything ``job`` holds."""
        self._live.discard(job)
        job.reset()
        self._free_unowned()
        self._is_crowded = False

    def _free_unowned(self) -> None:
        """Free what no live job owns: also what an interrupt left between its making and its noting."""
        owned = {branch.seq for job in self._live for branch in job.branches}
        for seq in self.pool.sequences():
            if seq not in owned:
                self.pool.free(seq)
        images = {job.branches[0].image for job in self._live if job.branches}
        for image in self.view.images.starts():
            if image not in images:
                self.view.images.free(image)

    def _too_small(self) -> OutOfPages:
        size = f"num_pages={self.pool.num_pages} of page_size={self.pool.page_size}"
        return OutOfPages(f"the KV cache ({size}) is too small for this search alone; raise num_pages")
