"""What of ``torch.cuda`` captures graphs, on the CPU: with the rules of its allocator, and graphs that can be replayed.

The rules are those of c10/cuda/CUDACachingAllocator.cpp and ATen/cuda/CUDAGraph.cpp in PyTorch 2.11:

- A capture begins with a new pool, or with one that some graph uses; a pool that has survived all of its graphs is an
  internal error. What survives is a pool with memory that is still in use, such as the workspace that cuBLAS takes on
  the first product on a stream.
- A capture in which the host waits for the device ends with an error. It leaves the allocator in the pool and the
  caller on the stream of the capture, and with the allocator in a pool memory can't be given back.
"""

import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.recording import Recording


class Waits(RuntimeError):
    """What an operator raises that waits for the device during a capture."""


@dataclass
class Pool:
    graphs: int = 0  # that use it
    workspaces: int = 0  # that cuBLAS has in it


class FakeCuda:
    """``FakeCuda(monkeypatch)`` stands in for the functions from then on; its fields say what came of the calls."""

    def __init__(self, monkeypatch):
        self.pools: dict[int, Pool] = {}
        self.streams = [_Stream()]  # those that were entered; the last is current
        self.with_workspace: set[_Stream] = set()
        self.into: int | None = None  # the pool that memory comes from
        self.captures = self.live_graphs = 0
        handles = count()
        for name, value in {
            "CUDAGraph": lambda: _Graph(self),
            "graph": self._graph,
            "graph_pool_handle": lambda: next(handles),
            "Stream": lambda device=None: _Stream(),
            "stream": self._stream,
            "current_stream": lambda device=None: self.streams[-1],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._leave, raising=False)

    @contextmanager
    def _stream(self, stream):
        depth = len(self.streams)
        self.streams.append(stream)
        try:
            with _Products(self):
                yield
        finally:
            del self.streams[depth:]

    def _leave(self, device, pool):
        if self.into != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.into = None

    def take_workspace(self) -> None:
        stream = self.streams[-1]
        if stream not in self.with_workspace:
            self.with_workspace.add(stream)
            if self.into is not None:
                self.pools[self.into].workspaces += 1

    @contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode):
        assert self.into is None, "captures_underway.empty() INTERNAL ASSERT FAILED"
        if pool in self.pools and not self.pools[pool].graphs:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.pools.setdefault(pool, Pool()).graphs += 1
        self.into = pool
        self.streams.append(stream)
        recording = Recording()
        try:
            with torch.inference_mode(), recording, _Products(self):
                yield
        except Waits as error:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        self.into = None
        self.streams.pop()
        graph.recorded(recording, pool)


class _Products(TorchDispatchMode):
    """Notices products of matrices."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function.overloadpacket) in ("aten.mm", "aten.addmm", "aten.bmm", "aten.matmul", "aten.linear"):
            self.cuda.take_workspace()
        return function(*args, **(kwargs or {}))


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    def __init__(self, cuda: FakeCuda):
        self.cuda, self.recording = cuda, None

    def recorded(self, recording: Recording, pool: int) -> None:
        if not recording.calls:
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)
        self.recording = recording
        self.cuda.captures += 1
        self.cuda.live_graphs += 1
        weakref.finalize(self, _release, self.cuda, pool)

    def replay(self) -> None:
        assert self.recording is not None
        with torch.inference_mode():
            self.recording.replay()


def _release(cuda: FakeCuda, pool: int) -> None:
    cuda.live_graphs -= 1
    cuda.pools[pool].graphs -= 1
    if not cuda.pools[pool].graphs and not cuda.pools[pool].workspaces:
        del cuda.pools[pool]
