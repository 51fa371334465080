"""Forkable paged KV caches, seeded multi-candidate sampling with stop tags, and log-probs without a softmax.

``StageTags`` and the modules of ``llava_cot_kernels.reference`` work without the compiled extension. Every other name
then raises ``ImportError`` on first use. The error says how to build the extension.
"""

from importlib import import_module
from typing import Any

import torch  # noqa: F401  (loads the libraries that _C is linked against)

from llava_cot_kernels.stage_tags import StageTags

_load_error: ImportError | None = None
try:
    import_module("llava_cot_kernels._C")  # registers torch.ops.llava_cot_kernels
except ImportError as error:
    _load_error = error
else:
    from llava_cot_kernels.attention import paged_attention, shared_attention
    from llava_cot_kernels.linear import few_row_linear
    from llava_cot_kernels.logprob import linear_logprobs, token_logprobs
    from llava_cot_kernels.page_pool import OutOfPages, PagePool
    from llava_cot_kernels.paged_kv import copy_pages, store_kv
    from llava_cot_kernels.sampling import SampleOutput, sample

__version__: str  # the version that is installed, or "0+unknown" in a source tree that is not

__all__ = [
    "OutOfPages",
    "PagePool",
    "SampleOutput",
    "StageTags",
    "copy_pages",
    "few_row_linear",
    "linear_logprobs",
    "paged_attention",
    "sample",
    "shared_attention",
    "store_kv",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if _load_error is not None and name in ("_C", *__all__):
        raise ImportError(
            f"llava_cot_kernels needs its compiled extension, which could not be imported ({_load_error}): install "
            "torch 2.11 or newer first, and then build the extension with `pip install -e .` or with `python setup.py "
            "build_ext --inplace`",
            name="llava_cot_kernels._C",
        ) from _load_error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llava-cot")
    except PackageNotFoundError:
        return "0+unknown"
