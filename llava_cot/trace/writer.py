"""Write a trace from the plain parts of a search, whatever ran it, and as strict JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from llava_cot.core import Usage
from llava_cot.stages import Grammar
from llava_cot.trace.schema import (
    TRACE_VERSION,
    CalibrationData,
    ConfigData,
    ErrorData,
    EventData,
    GrammarData,
    NodeData,
    TraceData,
    UsageData,
)


def trace_data(
    *,
    model: str,
    versions: Mapping[str, str],
    question: str | None,
    search: str,
    config: Mapping[str, Any],
    grammar: Grammar,
    seed: int,
    bos: str,
    calibration: CalibrationData | None,
    prompt_tokens: int,
    nodes: Sequence[NodeData],
    events: Sequence[EventData],
    answers: Sequence[int],
    usage: Usage,
    answer: int | None = None,
    error: BaseException | None = None,
) -> TraceData:
    """Return the data of a ``Trace``. ``TraceData`` describes each part.

    Args:
        answers: the nodes that the search returned, the best first; empty while it is running. They are ignored if the
            search failed.
        answer: the one of ``answers`` that this trace is about; by default the first.
        error: the exception that ended a failed search.
    """
    ids = [] if error else [*answers]
    return {
        "version": TRACE_VERSION,
        "versions": dict(versions),
        "model": model,
        "question": question,
        "search": search,
        "config": cast(ConfigData, config),
        "grammar": cast(GrammarData, grammar.to_dict()),
        "seed": seed,
        "bos": bos,
        "calibration": calibration,
        "prompt_tokens": prompt_tokens,
        "nodes": [*nodes],
        "events": [*events],
        "answer": answer if ids and answer is not None else next(iter(ids), None),
        "answers": ids,
        "usage": cast(UsageData, asdict(usage)),
        "error": _described(error) if error else None,
    }


def to_json(data: Any, indent: int | None = None) -> str:
    """Return ``data`` as strict JSON, in which inf, -inf and NaN are the strings "inf", "-inf" and "nan"."""
    try:  # nearly all data is finite, and to look at each value takes most of the time
        return json.dumps(data, indent=indent, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _described(error: BaseException) -> ErrorData:
    return {"type": type(error).__name__, "message": "\n".join([str(error), *getattr(error, "__notes__", ())])}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
