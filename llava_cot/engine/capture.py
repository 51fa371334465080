"""Steps as CUDA graphs: captured once for a rounded shape, and replayed on the same buffers afterwards."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Generic, NamedTuple, TypeVar

import torch

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
MIN_PAGES, MIN_SEGMENTS = 16, 4
MAX_BYTES = 2 << 30  # of the captured steps of one kind

Step = Callable[[], object]
Buffers = TypeVar("Buffers")


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


class Recorder:
    """Runs a step again on the same tensors: by calling it, which is all that a CPU needs."""

    def capture(self, step: Step) -> Step:
        return step


class CudaRecorder(Recorder):
    """Captures steps into CUDA graphs that share one memory pool, so that only one of them may run at a time.

    An empty graph keeps the pool in use for as long as the recorder lives. Without it, a pool may outlive all of its
    graphs, since cuBLAS keeps a workspace there, and PyTorch refuses to capture into a pool that nothing uses.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._keeps_pool = self._record(lambda: None)

    def capture(self, step: Step) -> Step:
        """Run ``step`` once, then capture it. A ``step`` that raises or waits for the device is not captured."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # of the capture: cuBLAS allocates its workspace here, outside of the pool
            step()
        current.wait_stream(self.stream)
        return self._record(step).replay

    def _record(self, step: Step) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # torch leaves neither the stream nor the pool of a capture that fails.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with recording:
                    step()
            except BaseException:
                with suppress(RuntimeError):  # it has left the pool
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                raise
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device, since cuBLAS keeps a workspace for each stream that it has worked on."""
    return torch.cuda.Stream(device)


def open_recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else Recorder()


class CapturedSteps(Generic[Buffers]):
    """Captured steps of one kind, by shape.

    While they hold more than ``max_bytes``, the least recently used is evicted. Kinds of steps may share a
    ``recorder`` if they never run at the same time.
    """

    def __init__(self, device: torch.device, recorder: Recorder, max_bytes: int = MAX_BYTES):
        self.device, self.recorder, self.max_bytes = device, recorder, max_bytes
        self._entries: OrderedDict[Shape, tuple[Buffers, Step, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers or, on CUDA, of everything that opening and capturing took."""
        return sum(size for _, _, size in self._entries.values())

    def get(
        self, shape: Shape, open_buffers: Callable[[], Buffers], step: Callable[[Buffers], None]
    ) -> tuple[Buffers, Step]:
        """The buffers of ``shape``, and a function that runs ``step`` on them."""
        if shape not in self._entries:
            free = self._free_bytes()
            buffers = open_buffers()
            run = self.recorder.capture(lambda: step(buffers))
            held = sum(value.nbytes for value in vars(buffers).values() if isinstance(value, torch.Tensor))
            self._entries[shape] = buffers, run, max(held, free - self._free_bytes())
            while len(self) > 1 and self.nbytes > self.max_bytes:  # no graph runs now: capturing waits for the device
                self._entries.popitem(last=False)
        self._entries.move_to_end(shape)
        buffers, run, _ = self._entries[shape]
        return buffers, run

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # as capturing does: the difference is what stays
        return torch.cuda.mem_get_info(self.device)[0]
