"""The settings of a training run: a YAML file, and ``key=value`` overrides from the command line."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llava_cot.core import Bos
from llava_cot.stages import STAGES

Part = Literal["vision", "projector", "language", "cross"]
DType = Literal["float32", "bfloat16"]
COARSE_LR = 5e-5  # below it, most updates of a bfloat16 weight are rounded away


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimizer(Settings):
    """The optimizer.

    ``adamw8bit`` (torchao, 8-bit moments) and ``adamw_stochastic`` (all in bfloat16) are for one big GPU.
    """

    name: Literal["adamw", "adamw8bit", "adamw_stochastic"] = "adamw"
    lr: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)


class Schedule(Settings):
    """The learning rate: a warm-up to the peak, and then one of three forms.

    ``cosine`` goes down to ``min_ratio`` of the peak, ``constant`` stays, and ``step`` multiplies by ``gamma`` each
    epoch.
    """

    name: Literal["cosine", "constant", "step"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    gamma: float = Field(default=0.85, gt=0, le=1)
    total_steps: int | None = Field(default=None, ge=1)  # length of the cosine; by default that of the run


class Precision(Settings):
    """Dtypes: of weights and optimizer state (``params``), of products (``compute``), of gradient sums (``reduce``)."""

    params: DType = "float32"
    compute: DType = "bfloat16"
    reduce: DType = "float32"
    allow_lost_updates: bool = False  # permit bfloat16 weights at a small learning rate


class Lora(Settings):
    """Low-rank adapters (peft) on the linear layers ``targets``. Everything else is frozen."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Sharding(Settings):
    """Sharding (HSDP): ``replicas`` groups hold every parameter, split over ``world_size / replicas`` ranks each."""

    replicas: int = Field(default=1, ge=1)
    reshard_after_forward: bool = True


class Dpo(Settings):
    """DPO (Rafailov et al., 2023, arXiv:2305.18290) on the pairs of ``llava-cot export --format preferences``."""

    beta: float = Field(default=0.1, gt=0)
    sft_weight: float = Field(default=0.0, ge=0)  # weight of the chosen one's negative log-likelihood in the loss


class TrainConfig(Settings):
    """All settings of a run. Paths are relative to the working directory of the command."""

    model: str  # folder or hub name in transformers' format
    output: Path
    data: Path
    images: Path = Path()
    eval_data: Path | None = None
    eval_images: Path | None = None  # default: ``images``
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)  # share of ``data`` to hold out; only without eval_data
    objective: Literal["sft", "dpo", "reward"] = "sft"
    bos: Bos = "one"
    seed: int = Field(default=0, ge=0)

    epochs: int = Field(default=3, ge=1)
    max_steps: int | None = Field(default=None, ge=1)  # stop here; the schedule keeps the length of the epochs
    batch_size: int = Field(default=32, ge=1)  # examples per step, over all ranks and micro-batches
    rows_per_batch: int = Field(default=4, ge=1)  # rows of a micro-batch on one rank
    max_row_tokens: int | None = Field(default=None, ge=1)  # pack examples into rows of at most this; None: no packing

    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Precision = Precision()
    freeze: tuple[Part, ...] = ()
    lora: Lora | None = None
    sharding: Sharding = Sharding()
    activation_checkpointing: bool = True
    stage_weights: dict[str, float] = {}  # weights of the loss of a token by its stage; default 1
    dpo: Dpo = Dpo()

    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager"] = "sdpa"
    threads: int | None = Field(default=None, ge=1)  # threads of torch on the CPU, per rank
    workers: int = Field(default=2, ge=0)  # processes that read images, per rank
    log_every: int = Field(default=10, ge=1)  # steps
    eval_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    asynchronous_checkpoints: bool = True
    export_dtype: DType = "bfloat16"
    wandb: str | None = None  # the project

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        params, optimizer = self.precision.params, self.optimizer
        if optimizer.name == "adamw_stochastic" and params != "bfloat16":
            raise ValueError(f"precision.params must be bfloat16 with adamw_stochastic, got {params}")
        lost = params == "bfloat16" and optimizer.lr < COARSE_LR and self.lora is None
        if lost and optimizer.name != "adamw_stochastic" and not self.precision.allow_lost_updates:
            raise ValueError(
                f"precision.params must be float32 at optimizer.lr={optimizer.lr:g}, got bfloat16: most updates "
                "would be rounded away; use optimizer.name=adamw_stochastic or precision.allow_lost_updates"
            )
        if unknown := set(self.stage_weights) - {str(stage) for stage in STAGES}:
            raise ValueError(f"stage_weights must name stages of {[str(s) for s in STAGES]}, got {sorted(unknown)}")
        if self.stage_weights and self.objective != "sft":
            raise ValueError(
                f"stage_weights must not be given with objective={self.objective}, got {self.stage_weights}"
            )
        if self.eval_data is not None and self.eval_fraction:
            raise ValueError(f"eval_fraction must be 0 with eval_data, got {self.eval_fraction}")
        if self.lora is not None and self.objective == "reward":
            raise ValueError("lora must not be given with objective=reward, whose head is trained from scratch")
        return self

    def with_images(self, evaluation: bool) -> tuple[Path | None, Path]:
        """Return the data file and its image folder."""
        return (self.eval_data, self.eval_images or self.images) if evaluation else (self.data, self.images)


class _Loader(yaml.SafeLoader):
    """As YAML says, a key may stand once in a mapping; PyYAML would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for at, key in enumerate(keys) if key in keys[:at]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path | str, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML file. ``overrides`` are ``key=value`` or ``part.key=value``, with values in YAML.

    Raises:
        ValueError: a setting is unknown or out of range; the message names all of them.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML, got {str(path)!r}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"config must be a mapping, got {type(data).__name__} in {str(path)!r}")
    for override in overrides or ():
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override must be key=value, got {override!r}")
        *parents, key = name.split(".")
        place: dict[str, Any] = data
        for parent in parents:
            below = place.setdefault(parent, {})
            if not isinstance(below, dict):
                raise ValueError(f"an override must name a setting, got {override!r}")
            place = below
        place[key] = yaml.safe_load(value)
    try:
        return TrainConfig(**data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}, got {_shown(e)}" for e in error.errors()]
        raise ValueError("; ".join(problems)) from None


def _shown(error: ErrorDetails) -> str:
    got = error.get("input")
    return repr(got) if not isinstance(got, dict | BaseModel) else "these settings"
