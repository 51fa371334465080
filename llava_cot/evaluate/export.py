"""Write results as predictions of VLMEvalKit and lmms-eval, whose own scorers then run without a model."""

import csv
import json
import time
from collections.abc import Iterable
from pathlib import Path

from llava_cot.atomic import check_output, check_output_folder, replacing
from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.files.table import open_table
from llava_cot.evaluate.result import Result

FAILED = "Failed to obtain answer via API."  # VLMEvalKit's mark of a prediction that is missing
_IMAGES = ("image", "image_path")


def write_vlmevalkit_table(
    benchmark: Benchmark, results: Iterable[Result], path: Path | str, *, repeat: int = 0
) -> int:
    """Write VLMEvalKit's prediction table: the columns of the TSV that was evaluated, "prediction" instead of images.

    A prediction is the conclusion. An answer that failed gets VLMEvalKit's mark for that, so that it can be asked again
    there. VLMEvalKit finds the table in ``outputs/MODEL/T20260101-000000/MODEL_DATASET.tsv``, or in the folder of any
    other time, if PRED_FORMAT is "tsv". Folders that are missing are made.

    Returns:
        The number of rows.

    Raises:
        ValueError: the data was no TSV, or a row of it has no result of this repeat.
    """
    source = benchmark.dataset.path
    if source is None or not source.lower().endswith(".tsv"):
        raise ValueError(f"data must be a VLMEvalKit TSV, whose columns its scorers read, got {source!r}")
    predictions = _predictions(benchmark, results, repeat)
    _make_room(path)
    with replacing(path) as file:
        source_table = open_table(source)
        columns = [name for name in source_table.columns if name not in _IMAGES]
        table = csv.DictWriter(
            file, [*columns, "prediction"], delimiter="\t", quoting=csv.QUOTE_ALL, extrasaction="ignore"
        )
        table.writeheader()
        for row, prediction in zip(source_table.scan(), predictions, strict=True):
            table.writerow({**row, "prediction": prediction})
    return len(predictions)


def write_lmms_eval_log(
    benchmark: Benchmark, results: Iterable[Result], path: Path | str, *, task: str, model: str, repeat: int = 0
) -> int:
    """Write a log that lmms-eval's model "from_log" replays: ``--model from_log --model_args logs=FOLDER``.

    lmms-eval counts the rows of its own dataset, so that the data must have the same rows in the same order.

    Args:
        path: a file that ends with ".json". FOLDER is the one that it is in.
        task: the name of lmms-eval's task, such as "mmstar".
        model: the name that the log gives the model.

    Returns:
        The number of rows.

    Raises:
        ValueError: a row has no result of this repeat, or ``path`` ends otherwise.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"the log must be a .json file, which from_log looks for, got {str(path)!r}")
    predictions = _predictions(benchmark, results, repeat)
    log = {
        "args": {"model": model, "model_args": "", "limit": None},
        "model_configs": {"task": task},
        "time": time.strftime("%m%d_%H%M"),
        "logs": [{"doc_id": number, "resps": [[text]]} for number, text in enumerate(predictions)],
    }
    _make_room(path)
    with replacing(path) as file:
        json.dump(log, file, ensure_ascii=False)
    return len(predictions)


def _make_room(path: Path | str) -> None:
    """Make the folder of a file that can then be written."""
    folder = Path(path).parent
    if not folder.is_dir():
        check_output_folder(folder, "out")
        folder.mkdir(parents=True)
    check_output(path, "out")


def _predictions(benchmark: Benchmark, results: Iterable[Result], repeat: int) -> list[str]:
    """The conclusions in the order of the benchmark's rows."""
    texts = {
        result.id: FAILED if result.error is not None else result.conclusion
        for result in results
        if result.repeat == repeat
    }
    ids = [benchmark.question(number).id for number in range(len(benchmark))]
    missing = [id for id in ids if id not in texts]
    if missing:
        raise ValueError(
            f"results must have an answer of repeat {repeat} for each of {len(ids)} rows, "
            f"got none for {len(missing)}, the first of which is {missing[0]!r}"
        )
    return [texts[id] for id in ids]
