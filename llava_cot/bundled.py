"""The bundled scale models by the names that ``SwiresGenerator.from_pretrained`` takes."""

from pathlib import Path

from llava_cot.tiny import tiny_path
from llava_cot.tiny_qwen import tiny_qwen_path

BUNDLED = {"tiny": tiny_path, "tiny-qwen": tiny_qwen_path}


def model_path(name: str | Path) -> str | Path:
    """Return the folder of a bundled model, or ``name`` itself if it is not one of theirs."""
    return BUNDLED[str(name)]() if str(name) in BUNDLED else name
