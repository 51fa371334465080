"""The examples of a run. They are encoded once, cached on disk, and read when they are needed."""

import hashlib
import inspect
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, ProcessorMixin

from llava_cot import literal
from llava_cot.data import encode
from llava_cot.data.batches import BatchPlan
from llava_cot.data.collate import Batch, Collator
from llava_cot.data.example import Example
from llava_cot.data.rows import parse_row, raw_rows
from llava_cot.families import training_of
from llava_cot.train.config import TrainConfig
from llava_cot.train.distributed import rank_0_first
from llava_cot.train.objectives.objective import Objective

Rows = list[list[int]]
RAW = datasets.Features({"number": datasets.Value("int64"), "raw": datasets.Value("large_binary")})
_TOKENS = [datasets.Value("int64")]
EXAMPLES = datasets.Features(
    {
        "examples": [
            {
                "input_ids": _TOKENS,
                "labels": _TOKENS,
                "stages": _TOKENS,
                "images": [datasets.Value("string")],
                "value": datasets.Value("float64"),
            }
        ],
        "length": datasets.Value("int64"),
    }
)


def load_examples(
    config: TrainConfig, objective: Objective, processor: ProcessorMixin, *, evaluation: bool = False
) -> datasets.Dataset:
    """Return the rows of the run's data as encoded, memory-mapped examples. They are encoded again only after a change.

    The column ``examples`` has the examples of a row, which stay together. ``length`` is their number of tokens.

    Raises:
        ValueError: the objective cannot use a row, which the message names. ``llava-cot validate`` finds all such rows.
    """
    path, images = config.with_images(evaluation)
    assert path is not None
    rows = _read(path)
    training = training_of(AutoConfig.from_pretrained(config.model))
    parts = [processor.chat_template, processor.tokenizer.backend_tokenizer.to_str()]
    parts.append(processor.image_processor.to_json_string())  # it decides how many tokens an image takes
    code = [inspect.getsource(part) for part in (type(objective), type(training).image_tokens, encode, literal)]
    settings = [rows._fingerprint, parts, config.bos, str(images), config.objective, code]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            found = objective.encode(parse_row(row["raw"]), processor, images, config.bos)
            examples = [encode.expand_images(example, processor, training) for example in found]
        except ValueError as error:
            message = f"row {row['number']} of {str(path)!r} must fit {config.objective}: {error}"
            raise ValueError(message) from None
        length = sum(len(example.input_ids) for example in examples)
        return {"examples": [vars(example) for example in examples], "length": length}

    with rank_0_first():
        return rows.map(
            encode_row, remove_columns=rows.column_names, features=EXAMPLES, new_fingerprint=fingerprint, desc="encode"
        )


def _read(path: Path) -> datasets.Dataset:
    """Return a table of the rows' JSON, of which no type is guessed."""
    if not path.is_file():
        raise ValueError(f"data must be a file, got {str(path)!r}")
    if not any(raw.strip() for raw in raw_rows(path)):
        raise ValueError(f"data must have a row, got none in {str(path)!r}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()  # the name of the cached table
    try:
        with rank_0_first():
            return datasets.Dataset.from_generator(
                _numbered, features=RAW, gen_kwargs={"path": str(path), "content": content}
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _numbered(path: str, content: str) -> Iterator[dict[str, Any]]:
    for number, raw in enumerate(raw_rows(path), 1):
        if raw.strip():
            yield {"number": number, "raw": raw}


def split(rows: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off a random share, always the same one, and return (training, held out)."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    held_out = max(1, round(len(rows) * fraction)) if fraction else 0
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


class Loader:
    """The micro-batches of this rank, from any step on. Other processes read the images in advance.

    ``values``, float32 [rows, examples of a row], replaces the values of the examples.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        plan: BatchPlan,
        collator: Collator,
        *,
        workers: int,
        pin_memory: bool,
        values: np.ndarray | None = None,
    ) -> None:
        self._rows, self._plan = _Collated(rows, collator, values), plan
        self._options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step from ``start`` to ``stop``."""
        # One queue serves all steps, so the first micro-batch of a step is read while the previous step computes.
        sampler = _MicroBatches(self._plan, start, stop)
        batches = iter(
            DataLoader(self._rows, batch_size=None, sampler=sampler, worker_init_fn=_ignore_stop, **self._options)
        )
        for step in range(start, stop):
            yield [next(batches) for _ in self._plan.micro_batches(step)]


def _ignore_stop(worker: int) -> None:
    # torchrun and Slurm send SIGTERM to every process, but the last step still needs its batches.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _MicroBatches:
    """A sampler that yields the rows of a micro-batch as its indices."""

    def __init__(self, plan: BatchPlan, start: int, stop: int) -> None:
        self._plan, self._steps = plan, range(start, stop)

    def __iter__(self) -> Iterator[Rows]:
        return (rows for step in self._steps for rows in self._plan.micro_batches(step))


class _Collated(Dataset):
    def __init__(self, rows: datasets.Dataset, collator: Collator, values: np.ndarray | None) -> None:
        self._rows, self._collator, self._values = rows, collator, values

    def __getitem__(self, rows: Rows) -> Batch:
        return self._collator([[example for index in row for example in self._examples(index)] for row in rows])

    def _examples(self, index: int) -> list[Example]:
        examples = [Example(**example) for example in self._rows[index]["examples"]]
        if self._values is None:
            return examples
        return [replace(example, value=value) for example, value in zip(examples, self._values[index].tolist())]
