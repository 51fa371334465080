"""Continuous batching of search programs over one paged KV pool."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TypeVar
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from llava_cot.engine.branch import Branch, Call, Expand, Extend, Rank, Ranked
from llava_cot.engine.call import call_together
from llava_cot.engine.draw import Row, candidates, draw, grow, stop
from llava_cot.engine.job import Job
from llava_cot.engine.runner import ModelRunner
from llava_cot.engine.schedule import Schedule
from llava_cot.engine.window import Window
from llava_cot_kernels.logprob import token_logprobs
from llava_cot_kernels.page_pool import OutOfPages
from llava_cot_kernels.stage_tags import StageTags

CUDA_STEPS_PER_LOOK = 4

_Request = TypeVar("_Request", Expand, Rank, Extend, Call)


class Engine:
    """Runs jobs on an unmodified model: ``engine.run(jobs)``, or ``for _ in engine.steps(jobs)`` to look in between.

    A step is one forward pass over one token of every growing branch of every job, and one draw for each. ``tags`` are
    the stop tags; their index is a branch's ``tag``. Pages and images are given back when a job ends, however it ends.

    Where nothing but growing is to be done, the host looks at what was drawn every ``steps_per_look`` steps only. What
    a branch draws does not depend on it, but up to so many steps run in vain once all branches have finished: None is
    4 on CUDA, where a look costs more, and 1 on the CPU. ``compile`` has torch compile the decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tags: StageTags,
        *,
        page_size: int = 16,
        num_pages: int | None = None,
        steps_per_look: int | None = None,
        compile: bool = False,
    ):
        if steps_per_look is not None and steps_per_look < 1:
            raise ValueError(f"steps_per_look must be >= 1, got {steps_per_look}")
        if page_size < 1:
            raise ValueError(f"page_size must be >= 1, got {page_size}")
        if num_pages is not None and num_pages < 1:
            raise ValueError(f"num_pages must be >= 1, got {num_pages}")
        self.runner = ModelRunner(model, page_size, num_pages, compile=compile)
        self.view, self.pool = self.runner.view, self.runner.pool
        self.tags = tags.to(self.view.device)
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        if steps_per_look is None:
            steps_per_look = CUDA_STEPS_PER_LOOK if self.view.device.type == "cuda" else 1
        self.window = Window(self.view, self.runner.recorder, self.tags, self.eos_token_ids, steps_per_look)
        # Weak, so that a job whose cleaning up was itself interrupted owns nothing once its caller has let go of it.
        self._live: WeakSet[Job] = WeakSet()

    @property
    def pages_in_use(self) -> int:
        return self.runner.pages_in_use

    @property
    def images_in_use(self) -> int:
        return len(self.view.images.starts())

    def run(self, jobs: Sequence[Job]) -> None:
        """Run every job to its end; one that fails has an ``error`` then and does not touch the others."""
        with closing(self.steps(jobs)) as steps:
            for _ in steps:
                pass

    def steps(self, jobs: Sequence[Job]) -> Generator[None, None, None]:
        """Run jobs, yielding after each step; closing the iterator frees everything they hold.

        Where pages run out, branches that do not grow lose theirs first; should that not do, the youngest job pauses
        until another has ended. Nothing that was drawn or scored is lost: keys and values are computed again when they
        are needed. A job that needs too many pages alone ends with ``OutOfPages``.
        """
        schedule = Schedule(self.runner, self._live, self.tags.start_state, jobs)
        try:
            while schedule:
                schedule.admit()
                if not self._window(schedule.running):
                    self._step(schedule)
                schedule.advance()
                yield
        finally:
            schedule.close()

    def _step(self, schedule: Schedule) -> None:
        """Compute the last token of what grows, is opened or ranked and all tokens of an extension, then draw one token
        for everything that grows.
        """
        running = schedule.running
        self._call(running)
        while True:
            try:
                self._prepare(running)
                logits, sources = self._compute(running)
                break
            except OutOfPages:
                schedule.relieve()
        self._rank(logits, sources, running)
        for job in running:
            job.usage.steps += bool(job.slots or any(not isinstance(request, Call) for request in job.requests))
            for request in job.requests:
                if isinstance(request, Expand):
                    job.open(request, self._fork(job, request))
                elif isinstance(answer := job.answers[request], Exception):
                    job.fail(answer)
                else:
                    job.reply(answer)
            job.requests, job.answers = [], {}
        slots = [slot for job in running for slot in job.slots]
        if not slots:
            return
        rows = [sources[slot.branch if slot.branch.tokens else slot.request.parent] for slot in slots]
        self._grow(running, draw(logits, candidates(rows, slots, logits.device), self.tags).rows())

    def _grow(self, running: list[Job], drawn: list[Row]) -> None:
        """Note what all growing branches of ``running`` drew; those that end with it grow no more."""
        slots = [slot for job in running for slot in job.slots]
        grow(slots, drawn, self.eos_token_ids, self.tags, self.pool)
        now = time.perf_counter()
        for job in running:
            job.usage.generated_tokens += len(job.slots)
            job.tick(now)
            stop(job)
            job.slots = [slot for slot in job.slots if slot.branch.finish is None]

    def _window(self, running: list[Job]) -> bool:
        """Let all branches grow by several tokens, if that is all there is to do; False if it takes a ``_step``."""
        slots = [slot for job in running for slot in job.slots]
        if not slots or any(job.requests for job in running) or any(slot.branch.seq < 0 for slot in slots):
            return False
        left = [slot.request.max_new_tokens - len(slot.branch.tokens) for slot in slots]
        counts = [min(count, self.window.num_steps) for count in left]
        seqs = [slot.branch.seq for slot in slots]
        if max(counts) == 1:
            return False
        try:
            slot_mapping = self.runner.append(seqs, counts)
        except OutOfPages:
            return False
        for rows in self.window.run(slots, counts, slot_mapping, self.pool.page_table(seqs)):
            for job in running:
                job.usage.steps += bool(job.slots)
                job.usage.decoded_tokens += len(job.slots)
            self._grow(running, [row for slot, row in zip(slots, rows) if slot.branch.finish is None])
        for slot in slots:
            if slot.branch.finish is not None:
                self.pool.truncate(slot.branch.seq, slot.branch.length - 1)
        return True

    def _call(self, running: list[Job]) -> None:
        calls = [(job, request) for job, request in _requests(running, Call) if request not in job.answers]
        results = call_together([request for _, request in calls])
        for job, request in calls:
            job.answers[request] = results[request]

    def _prepare(self, running: list[Job]) -> None:
        """Give pages to what is computed next, and make the branches that are ranked and extended."""
        for job in running:
            job.usage.recomputed_tokens += self.runner.restore(job.active(), job.branches)
            for request in job.requests:
                if isinstance(request, Rank) and request not in job.answers:
                    job.answers[request] = self._children(job, request)
                elif isinstance(request, Extend) and request not in job.answers:
                    job.answers[request] = [self._extension(job, request)]

    def _compute(self, running: list[Job]) -> tuple[torch.Tensor, dict[Branch, int]]:
        """The logits to draw from or to rank, [R, V], and the row of each branch.

        Raises ``OutOfPages`` before anything has changed.
        """
        opened = [(job, request.parent) for job, request in _requests(running, Expand) if request.seeds]
        looked_at = [(job, branch) for job, request in _requests(running, Rank) for branch in job.answers[request]]
        extensions = [(job, request, job.answers[request][0]) for job, request in _requests(running, Extend)]
        rows = {slot.branch: job for job in running for slot in job.slots}
        rows |= {branch: job for job, branch in opened + looked_at if branch.next_logits is None}
        tokens = {branch: branch.tokens[-1:] for branch in rows}
        # An extension reads the last token of its parent too, if nobody has yet.
        tokens |= {
            branch: (request.parent.tokens[-1:] if request.parent.next_logits is None else []) + branch.tokens
            for _, request, branch in extensions
        }
        parts, sources, at = [], {}, 0
        if tokens:
            parts.append(self.runner.decode(tokens))
        for branch, new in tokens.items():
            at += len(new)
            sources[branch] = at - 1
        for job in rows.values():
            job.usage.decoded_tokens += 1
        for job, request, branch in extensions:
            first = request.parent.next_logits
            read = parts[0][sources[branch] + 1 - len(tokens[branch]) : sources[branch]]
            read = read if first is None else torch.cat([first.unsqueeze(0), read])
            targets = torch.tensor(branch.tokens, device=read.device)
            branch.logprobs = token_logprobs(read, targets).tolist()
            branch.next_logits = parts[0][sources[branch]].clone()
            job.usage.prompt_tokens += len(tokens[branch])
        for _, parent in opened:
            if parent.next_logits is None:
                parent.next_logits = parts[0][sources[parent]].clone()
        for _, branch in opened + looked_at:
            if branch not in sources:
                assert branch.next_logits is not None
                sources[branch] = at
                at += 1
                parts.append(branch.next_logits.unsqueeze(0))
        return torch.cat(parts) if parts else self.view.kv_cache.new_empty(0, self.view.vocab_size), sources

    def _extension(self, job: Job, request: Extend) -> Branch:
        parent = request.parent
        (seq,) = self.pool.fork(parent.seq, 1)
        state = parent.tag_state
        for token in request.tokens:
            state, _, _ = self.tags.advance(state, token)
        length = parent.length + len(request.tokens)
        branch = Branch(parent, seq, length, parent.image, tag_state=state, tokens=list(request.tokens))
        job.branches.append(branch)
        return branch

    def _children(self, job: Job, request: Rank) -> list[Branch]:
        """Put the children of a ranked branch in its place; the first takes over its sequence, the others fork it."""
        parent = request.parent
        if request.children is None:
            return [parent]
        job.usage.generated_tokens += len(request.children)
        is_root = parent.parent is None
        seqs = self.pool.fork(parent.seq, max(0, len(request.children) - (not is_root)))
        if not is_root:
            job.branches.remove(parent)
            if request.children:
                seqs.insert(0, parent.seq)
            else:
                self.pool.free(parent.seq)
        children = [
            Branch(
                parent.parent or parent,
                seq,
                parent.length + 1,
                parent.image,
                tokens=[*parent.tokens, token],
                logprobs=[*parent.logprobs, logprob],
            )
            for seq, (token, logprob) in zip(seqs, request.children)
        ]
        job.branches += children
        return children

    @torch.inference_mode()
    def _rank(self, logits: torch.Tensor, sources: dict[Branch, int], running: list[Job]) -> None:
        ranks = _requests(running, Rank)
        if not ranks:
            return
        rows = [sources[branch] for job, request in ranks for branch in job.answers[request]]
        k = min(max(request.k for _, request in ranks), logits.shape[1])
        best = torch.log_softmax(logits[rows].float(), -1).topk(k)
        values = iter(zip(best.indices.tolist(), best.values.tolist()))
        for job, request in ranks:
            job.answers[request] = [
                Ranked(branch, tokens[: request.k], logprobs[: request.k])
                for branch, (tokens, logprobs) in zip(job.answers[request], values)
            ]

    def _fork(self, job: Job, request: Expand) -> list[Branch]:
        parent = request.parent
        seqs = self.pool.fork(parent.seq, len(request.seeds))
        kids = [
            Branch(parent, seq, parent.length, parent.image, seed=seed, tag_state=parent.tag_state)
            for seq, seed in zip(seqs, request.seeds)
        ]
        job.branches += kids
        job.usage.generations += len(kids)
        return kids


def _requests(jobs: list[Job], kind: type[_Request]) -> list[tuple[Job, _Request]]:
    return [(job, request) for job in jobs for request in job.requests if isinstance(request, kind)]
