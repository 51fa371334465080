"""The settings of an engine."""

from dataclasses import dataclass

from llava_cot.core import check_kinds


@dataclass(frozen=True)
class EngineConfig:
    """How an engine stores and computes; none of it changes what is drawn.

    Args:
        page_size: tokens in a page of the KV cache.
        num_pages: pages of the KV cache; None takes them from the memory that is free.
        steps_per_look: steps between two looks of the host at what was drawn, where nothing but growing is to be done.
            Up to so many steps run in vain once all candidates have finished. None is 4 on CUDA and 1 on the CPU.
        compile: whether torch compiles the steps of decoding, which takes a minute or more at the first ones. None
            compiles on CUDA, unless a decoder layer has a hook, and not on the CPU.
        draft_tokens: the most tokens that are drafted for a candidate in a step, from what the search drew before; 0
            drafts nothing. None is 8 where a step takes no longer for it: on CUDA, and on the CPU for models so small
            that they run on one thread.
        num_threads: CPU threads of a step. None is one thread for a model whose operators are too small for more, and
            as many as torch has been given for others.
        follow_model: whether every search first looks whether the caller has changed the model, which takes about a
            millisecond. Without it the engine goes on with the module tree that it has copied.
        canary: a debug flag: whether every pass checks that the pages it reads hold what was computed for the branches
            that read them. A search whose pages do not ends with ``CanaryError``.

    Raises:
        ValueError: a number below 1, or ``draft_tokens`` below 0.
    """

    page_size: int = 16
    num_pages: int | None = None
    steps_per_look: int | None = None
    compile: bool | None = None
    draft_tokens: int | None = None
    num_threads: int | None = None
    follow_model: bool = True
    canary: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("page_size", "num_pages", "steps_per_look", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise ValueError(f"draft_tokens must be >= 0, got {self.draft_tokens}")
