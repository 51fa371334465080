"""Plan whether a run fits in memory: ``llava-cot train --plan CONFIG --gpus 8x80GB``."""

import re
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from llava_cot.families import training_of
from llava_cot.train.config import TrainConfig
from llava_cot.train.memory import Memory, simulate_step
from llava_cot.train.model import build_model

ROW_TOKENS = 2048  # tokens of a row with one example, unless stated otherwise
TOKENS_PER_IMAGE = 1024  # tokens per image of a packed row, likewise
LOGITS = 12  # bytes per token and vocabulary entry: log-softmax, its gradient and that of the logits, in float32
SPARE = 0.1  # share of a GPU for what no allocator counts: CUDA's context, NCCL's buffers, fragmentation
GB = 10**9
LABELS = {
    "parameters": "parameters (shard)",
    "gradients": "gradients (shard)",
    "optimizer": "optimizer (shard)",
    "gathered weights": "weights, gathered",
    "activations": "activations, batch",
    "backward": "temporaries",
}


@dataclass(frozen=True)
class Plan:
    """The memory of a run per GPU, and the sizes that it was computed for."""

    gpus: int
    gpu_bytes: int
    rows: int  # rows of a micro-batch
    row_tokens: int
    images_per_row: int
    accumulates: bool
    steps_per_epoch: int | None  # None if the data does not exist
    parameters: dict[str, tuple[int, int]]  # by part: (all, trained ones)
    memory: Memory
    logits_bytes: int  # bytes that a loss on plain logits would hold as the backward begins

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` (uses memory that is kept for CUDA and NCCL) or ``does not fit``."""
        share = self.memory.total / self.gpu_bytes
        return "fits" if share <= 1 - SPARE else "tight" if share <= 1 else "does not fit"


def make_plan(
    config: TrainConfig, gpus: str, *, row_tokens: int | None = None, images_per_row: int | None = None
) -> Plan:
    """Plan a run on ``gpus``, e.g. ``8x80GB``, by simulating a step without allocating its memory.

    Args:
        row_tokens: tokens of each row, all supervised; by default ``max_row_tokens``, or 2048.
        images_per_row: images of each row, with all tiles; by default one, or one per 1024 tokens of a packed row.

    Raises:
        ValueError: an argument is out of range, ``config.model`` cannot be found, or its steps can't be simulated.
    """
    count, gpu_bytes = parse_gpus(gpus)
    row_tokens = row_tokens if row_tokens is not None else config.max_row_tokens or ROW_TOKENS
    if images_per_row is None:
        images_per_row = 1 if config.max_row_tokens is None else max(1, round(row_tokens / TOKENS_PER_IMAGE))
    for name, value in {"row_tokens": row_tokens, "images_per_row": images_per_row}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if count % config.sharding.replicas:
        raise ValueError(f"gpus must be a multiple of sharding.replicas={config.sharding.replicas}, got {gpus!r}")
    try:
        model = build_model(config, empty=True)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model must be a folder or a hub name that can be reached, got {config.model!r} ({reason}); "
            "to plan, a folder with a config.json will do"
        ) from None
    if training_of(model.config).reads_values:
        raise ValueError(f"model must be of a family whose steps read no values, got {type(model).__name__}")
    examples = -(-config.batch_size // count)  # per rank and step
    rows = min(config.rows_per_batch, examples)
    accumulates = examples > rows
    memory = simulate_step(
        config, ranks=count, rows=rows, row_tokens=row_tokens, images_per_row=images_per_row, accumulates=accumulates
    )
    vocab = model.config.get_text_config().vocab_size
    return Plan(
        gpus=count,
        gpu_bytes=gpu_bytes,
        rows=rows,
        row_tokens=row_tokens,
        images_per_row=images_per_row,
        accumulates=accumulates,
        steps_per_epoch=_steps_per_epoch(config),
        parameters=count_parameters(model),
        memory=memory,
        logits_bytes=0 if config.objective == "reward" else rows * row_tokens * vocab * LOGITS,
    )


def parse_gpus(gpus: str) -> tuple[int, int]:
    """Parse ``8x80GB`` as (8, 80 * 10**9).

    Raises:
        ValueError: ``gpus`` has another form.
    """
    found = re.fullmatch(r"(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*GB", gpus.strip(), re.IGNORECASE)
    if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
        raise ValueError(f"gpus must be COUNTxSIZEGB, e.g. 8x80GB, got {gpus!r}")
    return int(found[1]), int(float(found[2]) * GB)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the plan as two tables and a verdict."""
    console = console or Console()
    parts = Table("part", "parameters", "trained", title="Parameters, in millions")
    totals = tuple(sum(counts) for counts in zip(*plan.parameters.values()))
    for name, counts in (plan.parameters | {"all": totals}).items():
        parts.add_row(name, *(f"{count / 1e6:,.1f}" for count in counts))
    console.print(parts)
    memory = Table("", "end of forward", "peak", "update", title="Memory of a GPU, in GB (10^9 bytes)")
    moments = (plan.memory.forward, plan.memory.peak, plan.memory.update)
    for name in LABELS:
        memory.add_row(LABELS[name], *(f"{moment[name] / GB:.2f}" for moment in moments))
    memory.add_row("all", *(f"{sum(moment.values()) / GB:.2f}" for moment in moments))
    console.print(memory)
    for line in _lines(plan):
        console.print(line, highlight=False)


def _lines(plan: Plan) -> list[str]:
    again = ", while gradients of earlier micro-batches are held" if plan.accumulates else ""
    lines = [
        f"A micro-batch on each of {plan.gpus} GPUs: rows={plan.rows} of {plan.row_tokens} tokens, all of them "
        f"supervised, images_per_row={plan.images_per_row}{again}."
    ]
    if plan.logits_bytes:
        lines.append(
            "The head returns log-probs: a loss on logits would hold another "
            f"{plan.logits_bytes / GB:.2f} GB as backward begins."
        )
    if plan.steps_per_epoch is not None:
        lines.append(f"Steps an epoch: {plan.steps_per_epoch:,}.")
    lines.append(
        f"{plan.verdict}: {plan.memory.total / GB:.1f} GB of {plan.gpu_bytes / GB:g} GB, of which {SPARE:.0%} are kept "
        "for CUDA, NCCL and fragmentation."
    )
    return lines


def count_parameters(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return, for each part of the model, the number of its parameters and of its trained ones."""
    parts = training_of(model.config).parts
    labels = {"vision": "vision", "projector": "projector", "cross": "cross-attention layers"}
    patterns = {
        **{label: parts[part] for part, label in labels.items() if part in parts},
        "embedding": r"model\.language_model\.embed_tokens\.",
        "head": r"(lm_head|head)\.",
        "self-attention layers": "",  # and the last norm
    }
    counts = {name: (0, 0) for name in patterns}
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in patterns.items() if re.match(pattern, name))
        every, trained = counts[part]
        counts[part] = every + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts


def _steps_per_epoch(config: TrainConfig) -> int | None:
    if not config.data.is_file():
        return None
    with config.data.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    held_out = max(1, round(rows * config.eval_fraction)) if config.eval_fraction else 0  # as ``split`` does
    return -(-(rows - held_out) // config.batch_size)
