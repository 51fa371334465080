"""Export a sharded model to a folder that transformers reads."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig, ProcessorMixin

from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.train.config import TrainConfig
from llava_cot.train.model import build_model


def export(root: nn.Module, config: TrainConfig, processor: ProcessorMixin, folder: Path) -> None:
    """Write weights, configuration, processor and training settings. Adapters are merged. All ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(root, options=options)
    if dist.get_rank() == 0:
        dtype = getattr(torch, config.export_dtype)
        model = build_model(config.model_copy(update={"lora": None}), empty=True)
        weights = {name.removeprefix("model.").replace(".base_layer.", "."): tensor for name, tensor in state.items()}
        if config.lora is not None:
            weights = merge_adapters(weights, config.lora.alpha / config.lora.r)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.config.dtype = dtype
        if config.objective == "reward" and getattr(model.config, "policy_sha256", None) is None:
            model.config.policy_sha256 = checkpoint_sha256(config.model)  # verify_policy compares it
        model.config.use_cache = model.config.get_text_config().use_cache = True
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
        if model.can_generate():
            GenerationConfig.from_pretrained(config.model).save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(provenance(config), indent=1) + "\n")
    dist.barrier()


def merge_adapters(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Add each pair of adapters to its weight: ``W + scale * B A`` (Hu et al., 2021, arXiv:2106.09685)."""
    merged = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            weight = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (weight.float() + scale * up.float() @ down.float()).to(weight.dtype)
    return merged


def provenance(config: TrainConfig) -> dict:
    """Return the settings and the versions that produced the model."""
    packages = {name: _version(name) for name in ("llava-cot", "torch", "transformers")}
    return {
        "config": config.model_dump(mode="json"),
        "versions": packages | {"python": platform.python_version()},
        "world_size": dist.get_world_size(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None
