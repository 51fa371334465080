"""CUDA graphs of steps, each for a rounded shape."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
MIN_PAGES, MIN_SEGMENTS = 16, 4


class Shape(NamedTuple):
    """Of the buffers of a step: rounded up, so that few are captured."""

    rows: int
    pages: int  # of a row's page table
    segments: int  # of the image store
    prefixes: int  # that rows share

    @classmethod
    def with_room(cls, rows: int, pages: int, segments: int, prefixes: int) -> "Shape":
        return cls(
            next((size for size in ROWS if size >= rows), -(-rows // ROWS[-1]) * ROWS[-1]),
            _power_of_two(max(MIN_PAGES, pages)),
            _power_of_two(max(MIN_SEGMENTS, segments)),
            _power_of_two(prefixes) if prefixes else 0,
        )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def _memory(device: torch.device) -> Any:
    """For the intermediate results of all graphs: one runs at a time, and its results are in buffers of their own."""
    return torch.cuda.graph_pool_handle()


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What runs ``step`` again on the same tensors: elsewhere than on CUDA, itself."""
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # everything is compiled and allocated here
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_memory(device), capture_error_mode="thread_local"):
            step()
        return graph.replay
