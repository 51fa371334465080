"""Several steps of all growing branches on the device, all of them asked for before the host looks at the first."""

from collections.abc import Iterator
from typing import Any

import torch

from llava_cot.engine.batch import Batch, shared_prefixes
from llava_cot.engine.capture import CapturedSteps, Recorder, Shape, Step
from llava_cot.engine.draw import Candidates, Drawn, Row, candidates, draw
from llava_cot.engine.model import ModelView
from llava_cot.engine.session import Slot
from llava_cot_kernels.stage_tags import StageTags


class Buffers:
    """What a step reads and writes, at addresses that stay: R rows, one for each growing branch, the others idle.

    A row whose branch has finished is idle too: its token is neither computed, stored nor drawn again.
    """

    def __init__(self, shape: Shape, num_steps: int, num_tags: int, device: torch.device):
        rows = shape.rows

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # Of idle rows too the parameters must be valid.
        self.candidates = Candidates(*(column.new_zeros(rows) for column in candidates([], [], device)))
        self.candidates.top_p.fill_(1.0)
        self.token, self.offset, self.left = zeros(3, rows, dtype=torch.int64)  # offset: of its rotary positions
        self.image_group, self.prefix_group = zeros(2, rows, dtype=torch.int32)
        self.ends = zeros(rows, num_tags + 1, dtype=torch.bool)  # by tag; the last column is for no tag
        self.slot_mapping = zeros(num_steps, rows, dtype=torch.int64)
        self.page_table = zeros(rows, shape.pages, dtype=torch.int32)
        self.image_cu_seqlens = zeros(shape.segments + 1, dtype=torch.int32)
        self.prefix_lens = zeros(shape.prefixes, dtype=torch.int32)
        self.step = zeros(1, dtype=torch.int64)
        self.drawn = Drawn(zeros(num_steps, 4, rows, dtype=torch.int64), zeros(num_steps, 4, rows, dtype=torch.float32))
        # Where the host looks; there is no pinned memory without a GPU, and no need of it.
        is_cuda = device.type == "cuda"
        self.seen = (
            Drawn(*(torch.zeros_like(t, device="cpu").pin_memory() for t in self.drawn)) if is_cuda else self.drawn
        )
        self.marks = [torch.cuda.Event() for _ in range(num_steps)] if is_cuda else []


class Window:
    """Up to ``num_steps`` steps in a row, each a forward pass and a draw; on CUDA a captured graph that is replayed."""

    def __init__(
        self, view: ModelView, recorder: Recorder, tags: StageTags, eos_token_ids: frozenset[int], num_steps: int
    ):
        self.view, self.tags, self.num_steps = view, tags, num_steps
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids) or [-2], device=view.device)
        self.num_tags = len(tags.tags)
        self.captured = CapturedSteps[Buffers](view.device, recorder)

    def run(
        self, slots: list[Slot], counts: list[int], slot_mapping: torch.Tensor, page_table: torch.Tensor
    ) -> Iterator[list[Row]]:
        """Let each branch grow by up to ``counts[i]`` tokens, until it finishes.

        Args:
            slot_mapping: int64 [sum(counts)], where the keys and values of each branch's tokens go.
            page_table: int32 [N, P], with room for them.

        Returns:
            for each step the ``Row`` of each branch; those behind its end mean nothing. While the host is busy with one
            step the device goes on with the next ones. To be read before the next call.
        """
        at = self._launch(slots, counts, slot_mapping, page_table)
        for index in range(max(counts)):
            for mark in at.marks[index : index + 1]:
                mark.synchronize()
            yield Drawn(*(part[index, :, : len(slots)] for part in at.seen)).rows()

    @torch.inference_mode()
    def _launch(
        self, slots: list[Slot], counts: list[int], slot_mapping: torch.Tensor, page_table: torch.Tensor
    ) -> Buffers:
        n, branches = len(slots), [slot.branch for slot in slots]
        with torch.cuda.device_of(self.view.kv_cache):
            image_group, image_cu_seqlens = self.view.images.segments([branch.image for branch in branches])
            prefix_group, prefix_lens = shared_prefixes(branches)
            num_segments = 0 if image_cu_seqlens is None else len(image_cu_seqlens) - 1
            to, step = self._open(n, page_table.shape[1], num_segments, len(prefix_lens))
            for buffer, values in zip(to.candidates, candidates([*range(n)], slots, torch.device("cpu"))):
                _put(buffer[:n], values)
            _put(to.token[:n], [branch.tokens[-1] for branch in branches])
            _put(to.offset[:n], [branch.position_offset for branch in branches])
            _put(to.left, [*counts, *[0] * (len(to.left) - n)])
            _put(to.ends[:n], [self._ends(slot) for slot in slots])
            places = torch.full_like(to.slot_mapping, -1, device="cpu")
            for row, of_branch in enumerate(slot_mapping.split(counts)):
                places[: len(of_branch), row] = of_branch
            _put(to.slot_mapping, places)
            _put(to.page_table[:n, : page_table.shape[1]], page_table)
            _put(to.prefix_group[:n], prefix_group)
            _put(to.prefix_lens[: len(prefix_lens)], prefix_lens)
            if image_group is not None and image_cu_seqlens is not None:
                to.image_group[:n] = image_group
                to.image_cu_seqlens[: num_segments + 1] = image_cu_seqlens
                to.image_cu_seqlens[num_segments + 1 :] = image_cu_seqlens[-1:]
            to.step.zero_()
            for index in range(max(counts)):
                step()
                for mark in to.marks[index : index + 1]:
                    for host, drawn in zip(to.seen, to.drawn):
                        host[index].copy_(drawn[index], non_blocking=True)
                    mark.record()
        return to

    def _open(self, n: int, pages: int, segments: int, prefixes: int) -> tuple[Buffers, Step]:
        """Buffers with room for ``n`` rows, all of them idle or stale, and what runs a step on them."""
        shape = Shape.with_room(n, pages, segments, prefixes)
        return self.captured.get(
            shape, lambda: Buffers(shape, self.num_steps, self.num_tags, self.view.device), self.step
        )

    def _ends(self, slot: Slot) -> list[bool]:
        """Which tags finish it."""
        stops, trims = slot.request.stops, slot.request.trims
        return [stops is None or tag in stops or tag in trims for tag in range(self.num_tags)] + [False]

    def step(self, at: Buffers) -> None:
        """One forward pass and one draw, from these buffers into them; the host is neither asked nor waited for."""
        alive, length = at.left > 0, at.candidates.position  # its last token included
        batch = Batch(
            slot_mapping=torch.where(alive, at.slot_mapping.index_select(0, at.step)[0], -1),
            page_table=at.page_table,
            seq_lens=torch.where(alive, length, 0).int(),
            prefix_group=torch.where(alive, at.prefix_group, -1) if len(at.prefix_lens) else None,
            prefix_lens=at.prefix_lens if len(at.prefix_lens) else None,
            image_group=torch.where(alive, at.image_group, -1) if self.view.cross_layers else None,
            image_cu_seqlens=at.image_cu_seqlens if self.view.cross_layers else None,
        )
        logits = self.view.decode(at.token, length + at.offset - 1, batch)
        drawn = draw(logits, at.candidates._replace(row=torch.where(alive, at.candidates.row, -1)), self.tags)
        for buffer, new in zip(at.drawn, drawn):
            buffer.index_copy_(0, at.step, new.unsqueeze(0))
        token, tag_state, tag, _ = drawn.integers
        ended = (token.unsqueeze(1) == self.eos_token_ids).any(1)
        ended |= at.ends.gather(1, torch.where(tag < 0, self.num_tags, tag).unsqueeze(1)).squeeze(1)
        at.left.copy_(torch.where(ended | (token < 0), 0, at.left - 1))
        at.token.copy_(token.clamp(min=0))
        at.candidates.tag_state.copy_(tag_state)
        length.add_(1)
        at.step.add_(1)


def _put(buffer: torch.Tensor, values: Any) -> None:
    host = torch.as_tensor(values, dtype=buffer.dtype)
    buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)
