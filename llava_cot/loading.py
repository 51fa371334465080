"""Check the arguments of ``from_pretrained`` before anything is read or downloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_cot_kernels.checks import FLOATS

# Those of transformers' from_pretrained that say where files come from; the processor's files are beside the model's.
SOURCE = (
    *("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
    *("trust_remote_code", "code_revision"),
)
DTYPES = [str(dtype).removeprefix("torch.") for dtype in FLOATS]


def source_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the keyword arguments of ``from_pretrained`` that say where files come from."""
    return {name: settings[name] for name in SOURCE if name in settings}


def check_name(name: object) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``name`` is a folder or may be the name of a model on the hub."""
    if not isinstance(name, (str, Path)):
        raise TypeError(f"name must be a folder or a hub name, got {name!r}")
    if not str(name).strip():
        raise ValueError(f"name must be a folder or a hub name, got {name!r}")
    is_path = isinstance(name, Path) or name.startswith(("/", ".", "~"))
    if is_path and not Path(name).is_dir():
        raise ValueError(f"name must be a folder or a hub name, got {str(name)!r}, which is no folder")


def check_dtype(dtype: object) -> None:
    """Raise ``ValueError`` unless ``dtype`` is "auto" or one that the kernels have, or its name."""
    name = str(dtype).removeprefix("torch.")
    if dtype != "auto" and (name not in DTYPES or not isinstance(dtype, (str, torch.dtype))):
        raise ValueError(f"dtype must be 'auto' or one of {DTYPES}, got {dtype!r}")


def check_device(device: Any) -> None:
    """Raise ``ValueError`` unless ``device`` is one that torch can use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of them where a back end is missing
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {reason}") from None
