"""The trace of a search: its schema, its writer, its reader, and queries on it. No torch."""

from llava_cot.trace.reader import (
    Record,
    TraceError,
    holds_many,
    parse_trace,
    read_trace,
    read_traces,
    scan_traces,
)
from llava_cot.trace.schema import TRACE_VERSION
from llava_cot.trace.trace import Trace
from llava_cot.trace.writer import to_json, trace_data

__all__ = [
    "TRACE_VERSION",
    "Record",
    "Trace",
    "TraceError",
    "holds_many",
    "parse_trace",
    "read_trace",
    "read_traces",
    "scan_traces",
    "to_json",
    "trace_data",
]
