"""Measure the peak memory of a training step: ``python benchmarks/bench_train_memory.py``.

1. The prediction of ``llava-cot train --plan`` beside what a step of the trainer's own modules holds. On the CPU (124M
   parameters) torch's memory tracker and the resident pages measure it. On CUDA (3.1B) the allocator does.
2. The loss from the fused head beside transformers' own from plain logits, at a vocabulary of 128,256.

Each figure is from a fresh process. If one fails, its row has the error, and the others are measured anyway. Times are
from a shared machine and therefore rough.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from timing import NEEDS_GPU, Results, check_device, environment, memory_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

try:
    from llava_cot.data.collate import Batch
    from llava_cot.train.config import Precision, TrainConfig
    from llava_cot.train.distributed import process_group
    from llava_cot.train.loss_head import LossHead
    from llava_cot.train.memory import by_category, simulate_step, step_inputs
    from llava_cot.train.model import build_model
    from llava_cot.train.objectives.objective import Step
    from llava_cot.train.objectives.sft import Sft
    from llava_cot.train.optimizer import build_optimizer
    from llava_cot.train.sharding import build_mesh, checkpoint_activations, shard
except ModuleNotFoundError as error:
    print(f"{Path(sys.argv[0]).name} needs the package {error.name}, which is not installed")
    sys.exit(NEEDS_GPU)

GEOMETRY = dict(max_num_tiles=4, patch_size=14)
SHAPES = {  # text and vision of an Mllama
    "124M": (
        dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
             num_key_value_heads=4, cross_attention_layers=[3, 8]),
        dict(hidden_size=320, intermediate_size=1280, num_hidden_layers=6, num_global_layers=2, attention_heads=4,
             image_size=112, intermediate_layers_indices=[1, 3], vision_output_dim=960),
    ),
    "3.1B": (  # one 80 GB GPU can train this with float32 masters
        dict(vocab_size=128256, hidden_size=2560, intermediate_size=8704, num_hidden_layers=20, num_attention_heads=20,
             num_key_value_heads=4, cross_attention_layers=[3, 8, 13, 18]),
        dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=16, num_global_layers=4, attention_heads=16,
             image_size=560, intermediate_layers_indices=[3, 7, 15], vision_output_dim=5120),
    ),
}  # fmt: skip
STEPS = {"cpu": ("124M", 2, 512, 1), "cuda": ("3.1B", 1, 4096, 4)}  # shape, rows, tokens of a row, images of a row
HEAD_ROWS = (512, 2048, 8192)
SPARE = 6 << 30  # bytes of memory that are left to other programs
HEAD_SHAPE = dict(
    vocab_size=128256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, cross_attention_layers=[1],
)  # fmt: skip


def write_shape(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> MllamaConfig:
    """Write the ``config.json`` of an Mllama to a folder. An empty model needs nothing else."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    settings = MllamaConfig(
        text_config=MllamaTextConfig(**text, rope_parameters=rope, **special),
        vision_config=MllamaVisionConfig(**vision, **GEOMETRY),
        image_token_index=text["vocab_size"],
    )
    settings.save_pretrained(folder)
    return settings


def run_config(folder: Path, *, compute: str, checkpointing: bool, device: str = "cpu") -> TrainConfig:
    precision, nowhere = Precision(compute=compute), folder / "none"
    return TrainConfig(
        model=str(folder), output=nowhere, data=nowhere, precision=precision, activation_checkpointing=checkpointing,
        device=device,
    )  # fmt: skip


def measure_step(config: TrainConfig, device: torch.device, rows: int, row_tokens: int, images: int) -> dict[str, Any]:
    """Measure the bytes of the second step, when the optimizer has its state. The weights are random."""
    before = memory_bytes("VmRSS")
    root, optimizer = build_run(config, device)
    batch = random_batch(root.model.config, rows, row_tokens, images).to(device)

    def step() -> None:
        train_step(root, optimizer, batch)

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return {"max_memory_allocated": torch.cuda.max_memory_allocated()}
    tracker = FSDPMemTracker(root, optimizer)
    tracker.track_inputs((batch.inputs,))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
    with tracker:
        step()
    peak, resident = by_category(tracker, "peak"), memory_bytes("VmHWM") - before
    return {"tracker": sum(peak.values()), "categories": peak, "resident": resident}


def build_run(config: TrainConfig, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Build the trainer's root module and optimizer, with random weights."""
    root = Step(build_model(config, empty=True), Sft({}))
    if config.activation_checkpointing:
        checkpoint_activations(root)
    shard(root, build_mesh(device, config.sharding.replicas), config.precision, config.sharding)
    root.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*root.parameters(), *root.buffers()):
            tensor.fill_(0.01)
    return root, build_optimizer(root.parameters(), config.optimizer)


def train_step(root: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    total, _ = root(batch)
    total.backward()
    torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def random_batch(settings: MllamaConfig, rows: int, row_tokens: int, images: int) -> Batch:
    inputs = step_inputs(settings, rows=rows, row_tokens=row_tokens, images_per_row=images)
    inputs["input_ids"].random_(3, settings.text_config.vocab_size)
    ends = torch.arange(1, rows + 1) * row_tokens - 1
    return Batch(
        inputs=inputs, targets=inputs["input_ids"].clone(), stages=torch.zeros_like(inputs["input_ids"]), ends=ends,
        values=[math.nan] * rows, num_tokens=rows * row_tokens, num_padding=0,
        num_pairs=rows * row_tokens**2 // images,
    )  # fmt: skip


def step_case(device: str, compute: str, checkpointing: bool) -> dict[str, Any]:
    """Measure a row of the first table."""
    name, rows, row_tokens, images = STEPS[device]
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), *SHAPES[name])
        config = run_config(Path(folder), compute=compute, checkpointing=checkpointing, device=device)
        started = time.process_time()
        planned = simulate_step(
            config, ranks=1, rows=rows, row_tokens=row_tokens, images_per_row=images, accumulates=False
        )
        seconds = time.process_time() - started
        with process_group(device) as place:
            measured = measure_step(config, place, rows, row_tokens, images)
    return {"planned": planned.total, "planned_categories": planned.highest, "plan_seconds": seconds, **measured}


def head_case(provider: str, rows: int, dtype: str) -> dict[str, Any]:
    """Measure a row of the second table: a step of a small backbone on ``rows`` supervised tokens, without image."""
    step, model = head_step(provider, rows, dtype)
    before = memory_bytes("VmRSS")
    started = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    resident, seconds = memory_bytes("VmHWM") - before, time.perf_counter() - started
    return {"tracker": tracked(step, model), "resident": resident, "seconds": seconds}


def head_case_without_data(provider: str, rows: int, dtype: str) -> dict[str, Any]:
    """Count with the tracker on tensors without data, for sizes that do not fit on this machine."""
    with FakeTensorMode():
        step, model = head_step(provider, rows, dtype)
        return {"tracker": tracked(step, model)}


def head_step(provider: str, rows: int, dtype: str) -> tuple[Callable[[], None], nn.Module]:
    with tempfile.TemporaryDirectory() as folder:
        vision = dict(SHAPES["124M"][1], hidden_size=64, intermediate_size=64, vision_output_dim=192)
        settings = write_shape(Path(folder), HEAD_SHAPE, vision)
    model = MllamaForConditionalGeneration._from_config(settings, dtype=getattr(torch, dtype)).train()
    ids = torch.randint(3, HEAD_SHAPE["vocab_size"], (1, rows))
    if provider == "fused":
        model.lm_head = LossHead.of(model.lm_head)

    def step() -> None:
        if provider == "fused":
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = -model.lm_head(hidden.flatten(0, 1)[:-1], ids[0, 1:]).mean()
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return step, model


def tracked(step: Callable[[], None], model: nn.Module) -> int:
    """Return the most bytes that a step holds beyond the weights."""
    tracker = MemTracker()
    tracker.track_external(model)
    held = _total(tracker, "current")
    with tracker:
        step()
    return _total(tracker, "peak") - held


def _total(tracker: MemTracker, moment: str) -> int:
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot(moment).values())


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def in_process(*arguments: str) -> dict[str, Any]:
    # Every large tensor gets pages of its own, which are returned when it is freed. So resident memory is live memory.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return json.loads(timing.in_process(__file__, "--one", *arguments, environ=environ))


class Rows:
    """Collects the rows of a benchmark. A case that fails becomes a row with its error."""

    def __init__(self, results: Results):
        self.results, self.failed = results, False

    def add(self, case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        try:
            self.results.add({**case, **measure()})
        except RuntimeError as error:
            self.failed = True
            self.results.add({**case, "error": str(error)})
            print(f"{', '.join(map(str, case.values()))} failed: {error}", flush=True)


def add_steps(rows: Rows, device: str) -> None:
    for compute in ("float32", "bfloat16") if device == "cpu" else ("bfloat16",):
        for checkpointing in (False, True):
            name = "{}, rows={} of {} tokens and {} images".format(*STEPS[device])
            name += f", {compute}{', checkpointed' if checkpointing else ''}"
            rows.add({"part": "step", "case": name}, partial(step_row, name, device, compute, checkpointing))


def step_row(name: str, device: str, compute: str, checkpointing: bool) -> dict[str, Any]:
    row = in_process("step", device, compute, str(int(checkpointing)))
    measured = row.get("tracker", row.get("max_memory_allocated"))
    kinds = [kind for kind in ("planned", "tracker", "resident", "max_memory_allocated") if kind in row]
    shown = ", ".join(f"{kind} {row[kind] / 2**20:.0f}" for kind in kinds)
    print(f"{name}: {shown} MiB; planned / measured {row['planned'] / measured:.3f}", flush=True)
    return {**row, "ratio": row["planned"] / measured}


def add_heads(rows: Rows) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for tokens in HEAD_ROWS:
            print(f"V={HEAD_SHAPE['vocab_size']}, {tokens} supervised tokens, {dtype}", flush=True)
            for provider in ("fused", "plain"):
                case = {"part": "head", "provider": provider, "tokens": tokens, "dtype": dtype}
                rows.add(case, partial(head_row, provider, tokens, dtype, size))


def head_row(provider: str, tokens: int, dtype: str, size: int) -> dict[str, Any]:
    need = tokens * HEAD_SHAPE["vocab_size"] * 2 * (size + 4) if provider == "plain" else 0
    case = "head" if need + SPARE < available_bytes() else "head-without-data"
    row = in_process(case, provider, str(tokens), dtype)
    shown = [f"{kind} {row[kind] / 2**20:.1f} MiB" for kind in ("tracker", "resident") if kind in row]
    shown += [f"{row['seconds']:.1f} s"] if "seconds" in row else []
    print(f"  {provider}: {', '.join(shown)}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    match args.one:
        case ["step", device, compute, checkpointing]:
            print(json.dumps(step_case(device, compute, checkpointing == "1")))
        case ["head", provider, tokens, dtype]:
            print(json.dumps(head_case(provider, int(tokens), dtype)))
        case ["head-without-data", provider, tokens, dtype]:
            print(json.dumps(head_case_without_data(provider, int(tokens), dtype)))
        case None:
            rows = Rows(Results(args.json, machine=environment(args.device)))
            add_steps(rows, args.device)
            if args.device == "cpu":
                add_heads(rows)
            sys.exit(int(rows.failed))


if __name__ == "__main__":
    main()
