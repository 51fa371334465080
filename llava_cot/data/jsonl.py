"""Items and rows as JSON lines."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing
from llava_cot.data.traces import Item
from llava_cot.trace import TraceError, read_traces


def read_items(path: Path | str) -> Iterator[Item]:
    """The items of a file: ``{"trace": {...}, "image": "path", "gold": "...", "id": "..."}`` on each line.

    ``gold`` and ``id`` may be left out. ``llava_cot.trace.scan_traces`` says what else ``path`` may be.

    Raises:
        TraceError: a trace that can't be read, or one without an image. It names the file and the line.
    """
    for record in read_traces(path):
        if record.image is None:
            raise TraceError(record.source, "image must be given beside the trace, got none")
        yield Item(record.trace, record.image, record.gold, id=record.id)


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path | str) -> int:
    """Write ``rows`` as strict JSON, one a line, and return how many there were.

    The file appears when all are written: what ``rows`` raises leaves the old file, or none.
    """
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
