"""Plan whether a model and the candidates of a question fit on a GPU: ``llava-cot plan MODEL --gpu 24GB``."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from llava_cot.engine.config import EngineConfig
from llava_cot.engine.model import CUDA_PAGES_SHARE, ModelView
from llava_cot.quantize import LAYERS, decoder_matrices, dtype_of, empty_model, quantization

GB = 10**9
SPARE = 0.1  # share of a GPU for what no allocator counts: CUDA's context and fragmentation
IMAGE_COPIES = 4  # of an image's keys and values, while the prefill stacks and stores them
FLOAT32 = 4  # bytes; sampling works on logits and on a sorted copy of them in float32


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that one question takes on a GPU, and the sizes that they were computed for."""

    candidates: int
    prompt_tokens: int
    new_tokens: int
    num_pages: int  # that the question needs
    parts: dict[str, int]  # bytes by part: the weights' two parts, pages, image and working memory

    @property
    def weights(self) -> int:
        return self.parts["decoder layers"] + self.parts["other weights"]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, gpu_bytes: int) -> bool:
        """Whether all of it fits beside what is kept for CUDA."""
        return self.total <= gpu_bytes * (1 - SPARE)

    def fits_by_default(self, gpu_bytes: int) -> bool:
        """Whether the pages that an engine takes by default are as many as the question needs."""
        return self.parts["pages"] <= (gpu_bytes * (1 - SPARE) - self.weights) * CUDA_PAGES_SHARE


def memory_plan(
    config: Any,
    *,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    candidates: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 2048,
    page_size: int = EngineConfig.page_size,
) -> MemoryPlan:
    """Plan one question with one image of the largest size, from the model's transformers config alone.

    All candidates are kept until the search ends, and share the pages of the prompt. Weights, pages and the image are
    exact. The working memory is an upper estimate of what the largest pass holds beside them.

    Args:
        quantize: how the decoder's weights are quantised, as in ``SwiresGenerator.from_pretrained``.
        dtype: the dtype of everything else; by default that of the config, or bfloat16 where it names none.
        prompt_tokens: tokens of the prompt, image tokens included where the family has them in the prompt.
        new_tokens: tokens that each candidate draws after the prompt.

    Raises:
        ValueError: an argument is out of range, or the model is not supported.
    """
    sizes = {"candidates": candidates, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "page_size": page_size}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    model = empty_model(config, dtype or dtype_of(config, quantize))
    num_pages = -(-prompt_tokens // page_size) + candidates * -(-(prompt_tokens % page_size + new_tokens) // page_size)
    view = ModelView(model, EngineConfig(page_size, num_pages))
    vision_tokens, stored_tokens = view.family.largest_image(prompt_tokens)
    images = view.images.kv
    image = images.nbytes // max(1, view.images.capacity) * stored_tokens
    decoder = {name: module.weight for name, module in decoder_matrices(model).items()}
    others = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    others -= sum(weight.nbytes for weight in decoder.values())
    count = quantization(quantize).weight_bytes if quantize is not None else None
    quantized = sum(count(*weight.shape) if count else weight.nbytes for weight in decoder.values())
    parts = {
        "decoder layers": quantized,
        "other weights": others,
        "pages": view.kv_cache.nbytes,
        "image": image,
        "working memory": _working(model, candidates, prompt_tokens, vision_tokens) + IMAGE_COPIES * image,
    }
    return MemoryPlan(candidates, prompt_tokens, new_tokens, num_pages, parts)


def _working(model: Any, candidates: int, prompt_tokens: int, vision_tokens: int) -> int:
    """The bytes of the largest pass: what a layer holds, the logits, and a matrix whose quantisation is undone."""
    itemsize, text = model.dtype.itemsize, model.config.get_text_config()
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = {name: module for name, module in matrices.items() if module is not model.get_output_embeddings()}

    def layer(rows: int, modules: list[nn.Linear]) -> int:
        widest = max((max(module.in_features, module.out_features) for module in modules), default=0)
        return rows * 6 * widest * itemsize  # gate, up and their product in an MLP; more, but narrower, in attention

    passes = [
        layer(max(prompt_tokens, candidates), [module for name, module in inner.items() if name.startswith(LAYERS)]),
        layer(vision_tokens, [module for name, module in inner.items() if not name.startswith(LAYERS)]),
    ]
    logits = candidates * text.vocab_size * (itemsize + 2 * FLOAT32)
    return max(passes) + logits + max(module.weight.nbytes for module in inner.values())


def parse_memory(gpu: str) -> int:
    """Parse ``24GB`` as 24 * 10**9.

    Raises:
        ValueError: ``gpu`` has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", gpu.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"gpu must be its memory in GB (10^9 bytes), e.g. 24GB, got {gpu!r}")
    return int(float(found[1]) * GB)


def print_plan(plan: MemoryPlan, gpu_bytes: int, console: Console | None = None) -> None:
    """Print the plan as a table and a verdict."""
    console = console or Console()
    table = Table("", "GB", title="Memory on the GPU, in GB (10^9 bytes)")
    for name, count in (plan.parts | {"all": plan.total}).items():
        table.add_row(name, f"{count / GB:.2f}")
    console.print(table)
    verdict = "fits" if plan.fits(gpu_bytes) else "does not fit"
    lines = [
        f"{plan.candidates} candidates of {plan.new_tokens:,} tokens after a prompt of {plan.prompt_tokens:,} take "
        f"{plan.num_pages:,} pages.",
        f"{verdict}: {plan.total / GB:.1f} GB of {gpu_bytes / GB:g} GB, of which {SPARE:.0%} are kept for CUDA and "
        "fragmentation.",
    ]
    if plan.fits(gpu_bytes) and not plan.fits_by_default(gpu_bytes):
        lines.append(
            f"Set EngineConfig(num_pages={plan.num_pages}): by default the pages take only {CUDA_PAGES_SHARE:.0%} of "
            "what the weights leave, and candidates would be evicted."
        )
    for line in lines:
        console.print(line, highlight=False)
