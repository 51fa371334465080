"""What a run folder was made with: the protocol of every number in it. No torch until the versions are asked for."""

import json
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llava_cot
from llava_cot.atomic import replacing
from llava_cot.bundled import model_path
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.folder import PROTOCOL, read_protocol
from llava_cot.workers.task import ModelSettings

# What may change when a run goes on: more questions and repeats, other rules, another place of the same file.
MAY_CHANGE = ("rules", "limit", "repeats", "dataset.path")


def make_manifest(
    benchmark: Benchmark,
    settings: ModelSettings,
    *,
    preset: str,
    rules: str,
    seed: int,
    limit: int | None,
    repeats: int,
) -> dict[str, Any]:
    """Return the protocol of a run as JSON values."""
    return {
        "benchmark": benchmark.name,
        "dataset": vars(benchmark.dataset),
        "preset": preset,
        "rules": rules,
        "model": settings.model,
        "model_sha256": checkpoint_sha256(model_path(settings.model)),
        "search": settings.search,
        "settings": dict(settings.settings),
        "scorer": settings.scorer,
        "grammar": settings.grammar,
        "system": settings.system,
        "bos": settings.bos,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "seed": seed,
        "limit": limit,
        "repeats": repeats,
        "versions": {
            "llava_cot": llava_cot.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "source_commit": source_commit(),
        },
    }


def source_commit() -> str | None:
    """Return the git commit of this package's source, ending in "+changes" if files differ from it.

    None if the package is not in a git checkout of its own.
    """
    root = Path(llava_cot.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]  # a status would write its index
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with replacing(folder / PROTOCOL) as file:
        file.write(json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a run folder; None if it has none yet.

    Raises:
        ValueError: the file is none.
    """
    return read_protocol(folder) if (folder / PROTOCOL).exists() else None


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with the differences if a run can't go on in ``folder`` with the protocol ``now``."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in {**old, **new} if key not in MAY_CHANGE and old.get(key) != new.get(key)]
    if changed:
        lines = [f"  {key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} now" for key in changed]
        raise ValueError(
            f"out must be a new folder, or one of a run with the same settings, got {str(folder)!r}, which differs in\n"
            + "\n".join(lines)
        )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = json.loads(json.dumps(value))
    return flat


def seed_of(seed: int, id: str, repeat: int) -> int:
    """Return the seed of a question's search: the same in whatever order and by whichever worker it is answered."""
    digest = sha256(json.dumps([seed, id, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
