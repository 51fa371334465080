"""Make rows of training data from traces, with one function per format.

Every function takes items and yields rows, one trace at a time. A row is plain JSON without a null. It has the image's
name in ``images`` and says where it comes from: ``trace_id``, ``nodes`` (the ids of its candidates) and ``version``. A
candidate whose scorer failed, or gave no finite number, is never a label. docs/export.md has an example of each format.
"""

import inspect
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot.atomic import check_apart, check_output
from llava_cot.data.forms import MESSAGES, MessageForm, TextForm
from llava_cot.data.groups import to_groups
from llava_cot.data.jsonl import read_items, write_jsonl
from llava_cot.data.steps import to_steps
from llava_cot.data.traces import Item, trace_id
from llava_cot.data.trl import to_preferences, to_sft, to_unpaired

if TYPE_CHECKING:
    from transformers import ProcessorMixin

FORMATS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "sft": to_sft,
    "preferences": to_preferences,
    "unpaired": to_unpaired,
    "steps": to_steps,
    "groups": to_groups,
}


def export_file(
    traces: Path | str, out: Path | str, format: str, *, model: str | None = None, **settings: object
) -> int:
    """Write the rows of a file of items (see ``read_items``) to another file, and return how many there are.

    ``model`` is the folder or name of the processor for rows that are text (preferences and unpaired). By default it is
    the one that the traces name. ``settings`` are the keyword arguments of the format's function.

    Raises:
        ValueError: an ``out`` that is read or can't be written, an unknown format or setting, a bad item, or traces of
            different models without ``model``.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}")
    known = inspect.signature(FORMATS[format]).parameters
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is not supported by format={format!r}; its settings are {list(known)[1:]}")
    check_output(out, "out")
    check_apart(out, "out", traces, "traces")
    items = read_items(traces)
    form = known.get("form")
    if form is not None and form.default is inspect.Parameter.empty:
        first = next(items, None)
        if first is None:
            return write_jsonl([], out)
        name = model or first.trace.data["model"]
        if not name:
            raise ValueError("model must name the processor that renders text: the first trace names none, got ''")
        settings["form"] = TextForm(_processor(name))
        items = (item if model else _of_model(item, name) for item in chain([first], items))
    return write_jsonl(FORMATS[format](items, **settings), out)


def _of_model(item: Item, name: str) -> Item:
    model = item.trace.data["model"]
    if model != name:
        raise ValueError(
            f"model of trace {item.id or trace_id(item.trace)!r} must be that of the first trace, {name!r}, got "
            f"{model!r}; name one processor for all with model="
        )
    return item


def _processor(name: str) -> "ProcessorMixin":
    from transformers import AutoProcessor

    from llava_cot import families  # noqa: F401, it registers a processor
    from llava_cot.bundled import model_path

    return AutoProcessor.from_pretrained(model_path(name))


__all__ = [
    "FORMATS",
    "MESSAGES",
    "Item",
    "MessageForm",
    "TextForm",
    "export_file",
    "read_items",
    "to_groups",
    "to_preferences",
    "to_sft",
    "to_steps",
    "to_unpaired",
    "trace_id",
    "write_jsonl",
]
