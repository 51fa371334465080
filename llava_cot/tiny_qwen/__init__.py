"""The second bundled scale model, its processor and its calibration, in transformers' format."""

from pathlib import Path


def tiny_qwen_path() -> Path:
    """The folder of the second bundled model."""
    return Path(__file__).parent
