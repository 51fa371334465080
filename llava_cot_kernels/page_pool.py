"""Which pages hold which sequence: host bookkeeping for a paged KV cache whose sequences fork."""

from llava_cot_kernels._C import OutOfPages, PagePool

__all__ = ["OutOfPages", "PagePool"]
