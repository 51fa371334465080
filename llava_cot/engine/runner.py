"""A model and the pages of its branches: every forward pass, also that of what has lost its pages."""

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from llava_cot.engine.batch import Batch, has_blind_rows, shared_prefixes
from llava_cot.engine.branch import Branch
from llava_cot.engine.canary import CanaryError, Read
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.graphs import ROWS, Replay, open_recorder
from llava_cot.engine.model import ModelView
from llava_cot.families import Prompt
from llava_cot_kernels.page_pool import OutOfPages, PagePool
from llava_cot_kernels.paged_kv import copy_pages

TOKENS_PER_PASS = 8192  # of several prompts or branches together: what a pass holds besides keys and values


class ModelRunner:
    """Computes tokens of branches; raises ``OutOfPages`` before anything has changed."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        self.view = ModelView(model, config)
        self.canary = self.view.canary
        self.pool = PagePool(self.view.num_pages, config.page_size)
        self.recorder = open_recorder(self.view.device)
        self.replay = Replay(self.view, self.recorder)
        self.replays = self.view.device.type == "cuda"  # elsewhere idle rows only cost
        self.peak_pages = 0  # the most ever in use at once; may be reset

    @property
    def pages_in_use(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    def append(self, seqs: list[int], counts: list[int]) -> torch.Tensor:
        """Make room for ``counts`` new tokens of each sequence, copying what is shared: their slot mapping, int64."""
        slots, copies = self.pool.append(seqs, counts)
        self.peak_pages = max(self.peak_pages, self.pages_in_use)
        if len(copies):
            copies = copies.to(self.view.device)
            copy_pages(self.view.kv_cache, copies)
            if self.canary is not None:
                copy_pages(self.canary.cache, copies)
        return slots

    def prefill(self, roots: list[Branch], prompts: list[Prompt]) -> None:
        """Compute prompts, in one pass those whose images have one shape, if that is not too much at once."""
        passes: dict[tuple[int, ...] | None, list[list[int]]] = {}
        for row, prompt in enumerate(prompts):
            alike = passes.setdefault(self.view.family.image_shape(prompt), [[]])
            if alike[-1] and self._is_too_much([prompts[other] for other in (*alike[-1], row)]):
                alike.append([])
            alike[-1].append(row)
        for rows in (rows for alike in passes.values() for rows in alike):
            counts = [roots[row].length for row in rows]
            for row in rows:
                roots[row].seq = self.pool.create()
            slots = self.append([roots[row].seq for row in rows], counts)
            words = None
            if self.canary is not None:
                words = [self.canary.prompt(roots[row], prompts[row]["input_ids"][0]) for row in rows]
            found = self.view.prefill([prompts[row] for row in rows], [*slots.split(counts)], words)
            for row, prefilled in zip(rows, found):
                root = roots[row]
                root.next_logits, root.image, root.position_offset = prefilled

    def decode(self, tokens: dict[Branch, list[int]], *, with_logits: bool = True) -> torch.Tensor:
        """Compute the next tokens of branches: the logits [T, V] behind each, to be read before the next call."""
        branches, counts = [*tokens], [len(new) for new in tokens.values()]
        seqs, device = [branch.seq for branch in branches], self.view.device
        starts = [self.pool.length(seq) for seq in seqs]
        reads = [*map(Read, branches, starts, tokens.values())]
        slots = self.append(seqs, counts)
        if self.replays and len(seqs) < len(slots) <= ROWS[-1]:
            # As sequences of one token, which share their pages: a pass stores all keys before it reads any.
            reads = [Read(b, start, new[: at + 1], at) for b, start, new, _ in reads for at in range(len(new))]
            branches = [branch for branch, count in zip(branches, counts) for _ in range(count)]
            starts = [start + index for start, count in zip(starts, counts) for index in range(count)]
            seqs, counts = [branch.seq for branch in branches], [1] * len(slots)
        group, cu_seqlens = self.view.images.segments(
            [branch.image for branch, count in zip(branches, counts) for _ in range(count)]
        )
        prefix_group, prefix_lens = shared_prefixes(branches)

        def column(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        batch = Batch(
            slot_mapping=slots.to(device),
            page_table=self.pool.page_table(seqs).to(device),
            seq_lens=column([start + count for start, count in zip(starts, counts)]),
            cu_seqlens_q=column([0, *accumulate(counts)]),
            prefix_group=column(prefix_group) if prefix_lens else None,
            prefix_lens=column(prefix_lens) if prefix_lens else None,
            image_group=group,
            image_cu_seqlens=cu_seqlens,
            has_blind_rows=has_blind_rows(branches, group),
            trail=None if self.canary is None else self.canary.trail(reads),
        )
        positions = [
            start + branch.position_offset + index
            for branch, start, count in zip(branches, starts, counts)
            for index in range(count)
        ]
        read = torch.tensor([[token for new in tokens.values() for token in new], positions], device=device)
        if self.replays and batch.is_step:
            logits = self.replay.decode(read[0], read[1], batch)
        else:
            logits = self.view.decode(read[0], read[1], batch, with_logits=with_logits)
        if self.canary is not None and batch.page_table is not None and batch.trail is not None:
            self.canary.look(reads, batch.page_table, batch.trail)
        return logits

    def broken(self, branches: list[Branch]) -> dict[Branch, CanaryError]:
        """What the canary finds in the pages of ``branches`` that have some, between two passes."""
        found = [branch for branch in branches if branch.seq >= 0]
        if self.canary is None or not found:
            return {}
        reads = [Read(branch, min(self.pool.length(branch.seq), branch.length)) for branch in found]
        return self.canary.find(reads, self.pool.page_table([branch.seq for branch in found]).to(self.view.device))

    def _is_too_much(self, prompts: list[Prompt]) -> bool:
        family = self.view.family
        pixel_values = sum(map(family.pixel_values, prompts))
        padded = len(prompts) * max(prompt["input_ids"].shape[1] for prompt in prompts)
        return pixel_values > family.pixel_values_per_pass[self.view.device.type] or padded > TOKENS_PER_PASS

    def page_out(self, branches: Iterable[Branch]) -> None:
        """Take back the pages of branches that are not computed next, where they have any."""
        for branch in branches:
            if branch.seq >= 0:
                branch.computed = self.pool.length(branch.seq)
                self._free(branch)

    def restore(self, branches: list[Branch]) -> int:
        """Recompute ``branches`` where they have been evicted, and the ancestors that they need; the root has pages.

        A released ancestor that several of them share is recomputed for the time being, so that they share its pages
        again. Returns how many tokens were recomputed.
        """
        forks = Counter[Branch]()
        chain: dict[Branch, Branch] = {}  # evicted branches and their parents
        for branch in branches:
            while branch.seq < 0 and branch not in chain:
                assert branch.parent is not None
                chain[branch] = branch.parent
                branch = branch.parent
                forks[branch] += 1
        if not chain:
            return 0
        missing: dict[Branch, Branch] = {}  # and the ancestor or sibling that each is forked from
        for branch in chain:
            if not branch.is_released or forks[branch] > 1:
                origin = chain[branch]
                while origin in chain and origin.is_released and forks[origin] == 1:
                    origin = chain[origin]
                missing[branch] = origin
        missing |= self._shared(missing, branches)
        passing = [branch for branch in missing if branch.is_released]
        try:
            return self._recompute(missing)
        finally:
            for branch in passing:
                self._free(branch)

    def _shared(self, missing: dict[Branch, Branch], branches: list[Branch]) -> dict[Branch, Branch]:
        """The siblings that evicted branches are forked from, whose tokens begin as theirs: they shared these pages."""
        kin = dict[Branch | None, list[Branch]]()
        for branch in branches:
            if branch.seq >= 0:
                kin.setdefault(branch.parent, []).append(branch)
        found = dict[Branch, Branch]()
        for branch, origin in missing.items():
            others = kin.setdefault(branch.parent, [])
            if origin is branch.parent and others:
                nearest = max(others, key=lambda other: _agreement(branch, other))
                if _agreement(branch, nearest):
                    found[branch] = nearest
            others.append(branch)
        return found

    def _kept(self, branch: Branch, origin: Branch) -> int:
        """How many of the tokens that ``origin`` has in the pages are those of ``branch``, which lacks no more."""
        length = self.pool.length(origin.seq)
        if origin.parent is branch.parent:
            same = origin.length - len(origin.tokens) + _agreement(branch, origin)
            return min(same, length, branch.computed)
        return length

    def _recompute(self, missing: dict[Branch, Branch]) -> int:
        """Compute the keys of ``missing``, of all that can be forked at once in one pass."""
        count = 0
        while missing:
            level, size = dict[Branch, Branch](), 0
            for branch, origin in missing.items():
                lost = branch.computed - self._kept(branch, origin) if origin.seq >= 0 else 0
                if origin.seq >= 0 and (not level or size + lost <= TOKENS_PER_PASS):
                    level[branch] = origin
                    size += lost
            tokens = {}
            for branch, origin in level.items():
                path, (branch.seq,) = branch.path(), self.pool.fork(origin.seq, 1)
                self.pool.truncate(branch.seq, self._kept(branch, origin))
                branch.image = origin.image  # a released one has not heard that the prompt was prefilled again
                del missing[branch]
                prompt_length = branch.length - len(path)
                again = path[self.pool.length(branch.seq) - prompt_length : branch.computed - prompt_length]
                if again:
                    tokens[branch] = again
            for origin in set(level.values()):
                if origin.is_released and origin not in missing.values():
                    self._free(origin)  # before its forks write: one of them may take over its last page
            if not tokens:
                continue
            try:
                self.decode(tokens, with_logits=False)
            except OutOfPages:
                for branch in level:
                    self._free(branch)
                raise
            count += size
        return count

    def _free(self, branch: Branch) -> None:
        if branch.seq >= 0:
            self.pool.free(branch.seq)
            branch.seq = -1


def _agreement(branch: Branch, other: Branch) -> int:
    """With how many equal tokens two siblings begin."""
    pairs = zip(branch.tokens, other.tokens)
    return next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(branch.tokens), len(other.tokens)))
