"""Quantised weights: the names that ``quantize=`` takes, transformers' config for each, and what each needs.

The matrices of the decoder layers are quantised, those of cross-attention layers included. The vision encoder, the
projector, the embedding, the head and the norms stay in the model's dtype.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

# How the names of all that is in a decoder layer begin
LAYERS = ("model.language_model.layers.", "model.text_model.layers.")
# Regular expressions of the modules that transformers leaves alone
SKIPPED = [rf"(?!{'|'.join(map(re.escape, LAYERS))}).*"]
GROUP = 64  # columns of a matrix that share a scale, for the two ways with 4 bits
TINYGEMM_COLUMNS = 1024  # on a GPU, int4 pads a matrix to a multiple of so many columns
TORCHAO = {"torchao": "0.18", "accelerate": "1.1"}
BITSANDBYTES = {"bitsandbytes": "0.50", "accelerate": "1.1"}


@dataclass(frozen=True)
class Quantization:
    """A way to quantise.

    Attributes:
        packages: the packages that it needs, and the least version of each.
        capability: the least compute capability of a CUDA device.
        multiples: what the rows and the columns of a matrix must be multiples of.
        config: makes transformers' config for a device and the dtype of the model.
        weight_bytes: counts the bytes of a matrix with so many rows and columns on a GPU, scales included.
        dtype: the only dtype that the model may have; None if any will do.
        runs_on_cpu: whether it runs on a CPU too.
    """

    packages: dict[str, str]
    capability: tuple[int, int]
    multiples: tuple[int, int]
    config: Callable[[torch.device, torch.dtype], Any]
    weight_bytes: Callable[[int, int], int]
    dtype: torch.dtype | None = None
    runs_on_cpu: bool = True


def _int8(device: torch.device, dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=SKIPPED)


def _int4(device: torch.device, dtype: torch.dtype) -> TorchAoConfig:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the only one for CPUs
    from torchao.quantization import Int4WeightOnlyConfig

    if device.type == "cpu":
        config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    else:
        config = Int4WeightOnlyConfig(GROUP, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(config, modules_to_not_convert=SKIPPED)


def _float8(device: torch.device, dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return TorchAoConfig(config, modules_to_not_convert=SKIPPED)


def _nf4(device: torch.device, dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=SKIPPED,  # of 4 bits too, despite its name
    )


def _int4_bytes(rows: int, columns: int) -> int:
    columns = -(-columns // TINYGEMM_COLUMNS) * TINYGEMM_COLUMNS
    return rows * columns // 2 + rows * (columns // GROUP) * 4  # a scale and a zero in bfloat16


def _nf4_bytes(rows: int, columns: int) -> int:
    """Dettmers et al., 2023, arXiv:2305.14314, section 3: the scales are quantised to 8 bits, 256 in a block."""
    scales = rows * columns // GROUP
    code_books = 16 * 4 + 256 * 4 + 4  # of the weights and of the scales, and the mean of the scales
    return rows * columns // 2 + scales + 4 * -(-scales // 256) + code_books


QUANTIZATIONS = {
    "int8": Quantization(TORCHAO, (7, 5), (1, 1), _int8, lambda rows, columns: rows * (columns + 4 + 1)),
    "int4": Quantization(TORCHAO, (8, 0), (16, GROUP), _int4, _int4_bytes, torch.bfloat16),
    "float8": Quantization(
        TORCHAO, (8, 9), (16, 16), _float8, lambda rows, columns: rows * (columns + 4), torch.bfloat16, False
    ),
    "nf4": Quantization(BITSANDBYTES, (7, 5), (32, GROUP), _nf4, _nf4_bytes),
}


def check_quantize(name: object, dtype: str | torch.dtype, device: Any) -> None:
    """Check that ``name`` can be had on ``device``, with what is installed here, for a model of this dtype.

    Raises:
        ValueError: naming the argument that is wrong, or the package that is missing.
    """
    way = quantization(name)
    least = f"{way.capability[0]}.{way.capability[1]}"
    place = torch.device("cpu" if device is None else device)
    capability = torch.cuda.get_device_capability(place) if place.type == "cuda" else None
    if (capability or (0, 0)) < way.capability and not (place.type == "cpu" and way.runs_on_cpu):
        must = f"{'the CPU or ' if way.runs_on_cpu else ''}a GPU of compute capability {least} or higher"
        got = f"{str(place)!r}{f' of {capability[0]}.{capability[1]}' if capability else ''}"
        raise ValueError(f"device must be {must} with quantize={name!r}, got {got}")
    if dtype != "auto" and way.dtype is not None and _dtype(dtype) != way.dtype:
        raise ValueError(f"dtype must be {way.dtype} with quantize={name!r}, got {_dtype(dtype)}")
    for package, required in way.packages.items():
        advice = "pip install 'llava-cot[quantize]'"
        try:
            found = version(package)
        except PackageNotFoundError:
            message = f"quantize={name!r} needs {package}>={required}, which is not installed: {advice}"
            raise ValueError(message) from None
        if Version(found) < Version(required):
            raise ValueError(f"quantize={name!r} needs {package}>={required}, got {found}: {advice}")


def quantization(name: object) -> Quantization:
    """Return the way of this name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {sorted(QUANTIZATIONS)}, got {name!r}")
    return QUANTIZATIONS[name]


def loading_settings(name: str, config: Any, dtype: str | torch.dtype, device: Any) -> dict[str, Any]:
    """Return the arguments of transformers' ``from_pretrained`` that quantise a model while it is loaded.

    Args:
        name: a name that has passed ``check_quantize``.
        config: the transformers config of the model.
        dtype: the dtype of what is not quantised. "auto" is the only one that will do, or else that of ``config``, or
            bfloat16 where it names none.

    Raises:
        ValueError: the model is quantised already, or a matrix has a size that can't be quantised.
    """
    for each in (config, config.get_text_config()):
        if getattr(each, "quantization_config", None) is not None:
            raise ValueError(f"quantize must be None for a model that is quantised already, got {name!r}")
    way = QUANTIZATIONS[name]
    rows, columns = way.multiples
    for module_name, module in decoder_matrices(empty_model(config)).items():
        if module.out_features % rows or module.in_features % columns:
            size = f"{module.out_features} x {module.in_features}"
            raise ValueError(
                f"quantize={name!r} needs matrices of a multiple of {rows} rows and {columns} columns, got {size} in "
                f"{module_name}"
            )
    chosen = dtype_of(config, name) if dtype == "auto" else _dtype(dtype)
    place = torch.device("cpu" if device is None else device)
    return {"dtype": chosen, "quantization_config": way.config(place, chosen), "device_map": {"": place}}


def dtype_of(config: Any, name: str | None) -> torch.dtype:
    """Return the dtype of what is not quantised, if the caller asks for none."""
    only = quantization(name).dtype if name is not None else None
    return only or _dtype(config.dtype or config.get_text_config().dtype or torch.bfloat16)


def empty_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Build the model of a transformers config on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype).eval()  # it writes the dtype


def decoder_matrices(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the modules that ``quantize`` quantises, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(LAYERS) and isinstance(module, nn.Linear)
    }


def _dtype(dtype: Any) -> torch.dtype:
    return getattr(torch, str(dtype).removeprefix("torch."))
