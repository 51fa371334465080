"""One token of each of many sequences, through the model alone, at addresses that stay: a captured graph on CUDA."""

import torch

from llava_cot.engine.batch import Batch
from llava_cot.engine.capture import CapturedSteps, Recorder, Shape
from llava_cot.engine.model import ModelView


class Buffers:
    """Room for R rows; those that a pass does not need are idle: they read and write nothing."""

    def __init__(self, shape: Shape, view: ModelView):
        rows, device = shape.rows, view.device
        self.token, self.position = torch.zeros(2, rows, dtype=torch.int64, device=device)
        slot_mapping = torch.full((rows,), -1, device=device)
        image_group, prefix_group = torch.full((2, rows), -1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(rows, shape.pages, dtype=torch.int32, device=device)
        self.batch = Batch(
            slot_mapping=slot_mapping,
            page_table=self.page_table,
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            prefix_group=prefix_group if shape.prefixes else None,
            prefix_lens=torch.zeros(shape.prefixes, dtype=torch.int32, device=device) if shape.prefixes else None,
            image_group=image_group if view.cross_layers else None,
            image_cu_seqlens=torch.zeros(shape.segments + 1, dtype=torch.int32, device=device)
            if view.cross_layers
            else None,
        )
        self.logits = torch.zeros(rows, view.vocab_size, dtype=view.dtype, device=device)


class Replay:
    """``view.decode`` where every sequence has one token."""

    def __init__(self, view: ModelView, recorder: Recorder):
        self.view = view
        self.captured = CapturedSteps[Buffers](view.device, recorder)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As ``view.decode``; the logits are overwritten by the next call."""
        assert batch.page_table is not None
        n, pages = batch.page_table.shape
        segments = 0 if batch.image_cu_seqlens is None else len(batch.image_cu_seqlens) - 1
        shape = Shape.with_room(n, pages, segments, 0 if batch.prefix_lens is None else len(batch.prefix_lens))
        to, run = self.captured.get(shape, lambda: Buffers(shape, self.view), self.step)
        to.token[:n], to.position[:n] = token_ids, positions
        for name, idle in (("slot_mapping", -1), ("seq_lens", 0), ("image_group", -1), ("prefix_group", -1)):
            _put(getattr(to.batch, name), getattr(batch, name), idle)
        _put(to.batch.prefix_lens, batch.prefix_lens, 0)
        _put(to.batch.image_cu_seqlens, batch.image_cu_seqlens, None)
        to.page_table[:n, :pages] = batch.page_table
        run()
        return to.logits[:n]

    def step(self, at: Buffers) -> None:
        at.logits.copy_(self.view.decode(at.token, at.position, at.batch))


def _put(buffer: torch.Tensor | None, values: torch.Tensor | None, rest: int | None) -> None:
    """``rest`` None repeats the last value."""
    if buffer is not None and values is not None:
        buffer[: len(values)] = values
        buffer[len(values) :] = values[-1:] if rest is None else rest
