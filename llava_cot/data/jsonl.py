"""Items and rows as JSON lines."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing
from llava_cot.data.traces import Item
from llava_cot.trace import TraceError, read_traces


def read_items(path: Path | str) -> Iterator[Item]:
    """Read one item per line: ``{"trace": {...}, "image": "path", "gold": "...", "id": "..."}``.

    ``gold`` and ``id`` are optional. ``llava_cot.trace.scan_traces`` says what else ``path`` may be.

    Raises:
        TraceError: a trace can't be read or has no image; the message names the file and the line.
    """
    for record in read_traces(path):
        if record.image is None:
            raise TraceError(record.source, "image must be given beside the trace, got none")
        yield Item(record.trace, record.image, record.gold, id=record.id)


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path | str) -> int:
    """Write ``rows`` as strict JSON, one per line, and return how many there were.

    The file appears when all rows are written. If ``rows`` raises, an earlier file is unchanged.
    """
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
