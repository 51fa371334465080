"""Check whether data from outside is a trace: its version, its shape as the schema describes it, and its ids."""

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, cast, get_args, get_origin, get_type_hints, is_typeddict

from llava_cot.trace.schema import EVENTS, TRACE_VERSION, EventData, TraceData
from llava_cot.trace.trace import Trace

NUMBERS = ("inf", "-inf", "nan")  # written as strings, because JSON has none of them
NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
ID_FIELDS = ("nodes", "pool", "kept", "pruned")  # the fields of an event that hold node ids


def check_shape(data: Any) -> TraceData:
    """Return a copy of ``data`` in which "inf", "-inf" and "nan" are numbers. The longest lists may be shared.

    Raises:
        ValueError: ``data`` does not have the shape of a trace of this version. The message names the field.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"trace must be an object, got {type(data).__name__}")
    if data.get("version") != TRACE_VERSION:
        raise ValueError(f"trace.version must be {TRACE_VERSION}, got {data.get('version')!r}")
    return cast(TraceData, _checked(data, TraceData, "trace"))


def check_references(trace: Trace) -> None:
    """Check a trace's grammar and its references to nodes and stages, and that it has no answer if it has an error.

    Raises:
        ValueError: one of these is wrong. The message names the field.
    """
    data = trace.data
    try:
        stages = trace.grammar.names
    except ValueError as error:
        raise ValueError(f"trace.grammar must be a grammar: {error}") from None
    known = {0}
    for place, node in enumerate(data["nodes"]):
        field = f"trace.nodes[{place}]"
        if node["id"] in known:
            raise ValueError(f"{field}.id must be one that no other node has, and not 0, got {node['id']}")
        if node["parent"] not in known:
            raise ValueError(f"{field}.parent must be 0 or the id of a node before it, got {node['parent']}")
        if node["stage"] is not None and node["stage"] not in stages:
            raise ValueError(f"{field}.stage must be null or one of {list(stages)}, got {node['stage']!r}")
        known.add(node["id"])
    known.remove(0)
    named = {
        f"trace.events[{place}].{name}": event[name]
        for place, event in enumerate(cast(list[dict[str, Any]], data["events"]))
        for name in ID_FIELDS
        if event["event"] in EVENTS and name in event
    }
    named |= {"trace.answers": data["answers"], "trace.answer": [] if data["answer"] is None else [data["answer"]]}
    for field, ids in named.items():
        if not known.issuperset(ids):
            raise ValueError(f"{field} must name nodes of the trace, got {sorted({*ids} - known)[0]}")
    if data["answer"] is not None and data["error"] is not None:
        raise ValueError(f"trace.answer must be null if trace.error is not, got {data['answer']}")
    if (data["answer"] is None) != (not data["answers"]):
        raise ValueError(f"trace.answers must be empty if trace.answer is null, and only then, got {data['answers']}")


def _checked(value: Any, kind: Any, field: str, or_null: str = "") -> Any:
    """Return ``value`` in the form of ``kind``, a type of the schema. Raises ``ValueError`` naming ``field``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # the type or None
        return None if value is None else _checked(value, arguments[0], field, " or null")
    if kind is float and isinstance(value, str) and value in NUMBERS:
        return float(value)
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if kind in (float, str, bool) and isinstance(value, kind):
        return value
    if origin is list and isinstance(value, list):
        (inner,) = arguments
        if {*map(type, value)} == {inner}:  # token ids and log-probs, nearly all of a trace: not copied
            return value
        return [_checked(item, inner, f"{field}[{place}]") for place, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _checked(item, arguments[1], f"{field}[{key!r}]") for key, item in value.items()}
    if is_typeddict(kind) and isinstance(value, Mapping):
        return _checked_object(value, kind, field)
    raise ValueError(f"{field} must be {_described(kind)}{or_null}, got {value!r:.60}")


def _checked_object(value: Mapping[str, Any], kind: Any, field: str) -> dict[str, Any]:
    """Check an object of the schema. Fields that the schema does not have stay unchanged."""
    if kind is EventData:
        kind = EVENTS.get(str(value.get("event")), EventData)
    found = dict(value)
    for name, inner in _fields(kind).items():
        if name in value:
            found[name] = _checked(value[name], inner, f"{field}.{name}")
        elif name in kind.__required_keys__:
            raise ValueError(f"{field}.{name} must be {_described(inner)}, but it is missing")
    return found


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _described(kind: Any) -> str:
    if kind in NAMES:
        return NAMES[kind]
    if get_origin(kind) is types.UnionType:
        return " or ".join(map(_described, get_args(kind)))
    return "a list" if get_origin(kind) is list else "an object"
