"""Host bookkeeping for a paged KV cache whose sequences fork: which pages hold which sequence."""

from llava_cot_kernels import _C

OutOfPages = _C.OutOfPages
PagePool = _C.PagePool

__all__ = ["OutOfPages", "PagePool"]
