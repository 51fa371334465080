"""Host bookkeeping for a paged KV cache whose sequences fork: which pages hold which sequence."""

from collections.abc import Sequence

import torch

from llava_cot_kernels import _C
from llava_cot_kernels.checks import check_distinct, note_writes

OutOfPages = _C.OutOfPages


class PagePool(_C.PagePool):
    __doc__ = _C.PagePool.__doc__

    def page_table(self, seqs: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the pages of ``seqs``: CPU int32 ``[len(seqs), P]``, padded with 0; P >= 1 is the most pages of any.

        Args:
            seqs: sequences, which may repeat.
            out: what to fill and return instead of a new tensor: CPU int32 ``[len(seqs), at least P]``.

        Raises:
            KeyError: a sequence is freed or unknown.
            ValueError, TypeError: ``out`` has another type, dtype, shape or device, or overlaps itself.
        """
        if out is None:
            return super().page_table(seqs)
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out must be a tensor [{len(seqs)}, P], got {type(out).__name__}")
        if out.layout != torch.strided or out.device.type != "cpu":
            raise ValueError(f"out must be a dense tensor on the CPU, got layout {out.layout} on {out.device}")
        check_distinct("out", out)
        super().page_table(seqs, out)
        note_writes(out)
        return out


__all__ = ["OutOfPages", "PagePool"]
