"""Items and rows as JSON lines."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing
from llava_cot.data.traces import Item


def read_items(path: Path | str) -> Iterator[Item]:
    """Read one item per line: ``{"trace": {...}, "image": "path", "gold": "...", "id": "..."}``.

    ``gold`` and ``id`` are optional.

    Raises:
        ValueError: a line is not JSON or lacks a field; the message names the file and the line.
    """
    known = ("trace", "image", "gold", "id")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {str(path)!r} must be JSON, got {line[:40]!r}: {error}") from None
            if not isinstance(data, dict) or not {"trace", "image"} <= set(data) <= set(known):
                got = sorted(data) if isinstance(data, dict) else type(data).__name__
                raise ValueError(f"line {number} of {str(path)!r} must have trace and image of {known}, got {got}")
            yield Item(**data)


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
