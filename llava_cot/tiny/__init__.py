"""The bundled scale model, its processor and its calibration, in transformers' format."""

from pathlib import Path


def tiny_path() -> Path:
    """The folder of the bundled model."""
    return Path(__file__).parent
