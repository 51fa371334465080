"""Fast stage-level search for vision-language models that reason in stages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_cot.answer import Answer, Finished
    from llava_cot.core import Extend, SamplingParams
    from llava_cot.custom_generate import SearchOutput
    from llava_cot.engine.config import EngineConfig
    from llava_cot.generator import SwiresGenerator
    from llava_cot.remote import connect
    from llava_cot.scoring import Calibration
    from llava_cot.search import (
        NEXT,
        BestOfNConfig,
        Budget,
        GreedyConfig,
        MajorityConfig,
        SampleConfig,
        SentenceBeamConfig,
        StageBeamConfig,
        SwiresConfig,
        TokenBeamConfig,
    )
    from llava_cot.stages import LLAVA_COT, STAGES, Grammar, Stage
    from llava_cot.tiny import tiny_path

__version__: str  # of the installed distribution; "0+unknown" in a source tree that is not installed

__all__ = [
    "LLAVA_COT",
    "NEXT",
    "STAGES",
    "Answer",
    "BestOfNConfig",
    "Budget",
    "Calibration",
    "EngineConfig",
    "Extend",
    "Finished",
    "Grammar",
    "GreedyConfig",
    "MajorityConfig",
    "SampleConfig",
    "SamplingParams",
    "SearchOutput",
    "SentenceBeamConfig",
    "Stage",
    "StageBeamConfig",
    "SwiresConfig",
    "SwiresGenerator",
    "TokenBeamConfig",
    "connect",
    "tiny_path",
]

_HOMES = {
    "llava_cot.answer": ("Answer", "Finished"),
    "llava_cot.custom_generate": ("SearchOutput",),
    "llava_cot.core": ("Extend", "SamplingParams"),
    "llava_cot.engine.config": ("EngineConfig",),
    "llava_cot.generator": ("SwiresGenerator",),
    "llava_cot.remote": ("connect",),
    "llava_cot.scoring": ("Calibration",),
    "llava_cot.stages": ("LLAVA_COT", "STAGES", "Grammar", "Stage"),
    "llava_cot.tiny": ("tiny_path",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use: the commands that read data alone need no torch, which takes seconds and 400 MiB to import.
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME.get(name, "llava_cot.search")), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        advice = "pip install 'llava-cot[local]', or search on a server by llava_cot.connect(...)"
        raise ImportError(f"{name} runs a model, which needs {error.name}: {advice}", name=error.name) from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llava-cot")
    except PackageNotFoundError:
        return "0+unknown"
