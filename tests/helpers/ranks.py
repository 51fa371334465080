"""Real processes in a gloo group on this machine, as torchrun would start them."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")  # imports once for all ranks
CONTEXT.set_forkserver_preload(["llava_cot.train.trainer", "torch.utils.tensorboard"])


def start_ranks(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Processes that call ``function(*args)``, which must stand at the top level of a module, in one group."""
    place = tempfile.mkdtemp()
    processes = [
        CONTEXT.Process(target=_work, args=(rank, world_size, place, function, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 1800) -> list[Any]:
    """What the function returned on each rank; fails with the traceback of a rank that raised."""
    place = Path(tempfile.mkdtemp())
    processes = start_ranks(world_size, _keep_result, place, function, args)
    try:
        for process in processes:
            process.join(timeout)
        failures = [path.read_text() for path in sorted(place.glob("*.error"))]
        assert all(process.exitcode == 0 for process in processes), "\n".join(failures) or "a rank hung or died"
        return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    finally:
        for process in processes:
            process.kill()


class Ranks:
    """Ranks that run one function after another: what a process imports and caches once serves all of them.

    A rank that fails ends them all, and the next function gets new ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """As ``run_ranks``."""
        if not self._processes:
            self._connections, ends = zip(*(CONTEXT.Pipe() for _ in range(self.world_size)))
            self._processes = start_ranks(self.world_size, _serve, ends)
            for end in ends:
                end.close()
        place, lost = Path(tempfile.mkdtemp()), False
        for connection in self._connections:
            connection.send((place, function, args))
        for connection in self._connections:
            try:
                connection.recv()
            except (EOFError, ConnectionError):
                lost = True
        if lost:
            self.close()
        failures = [path.read_text() for path in sorted(place.glob("*.error"))]
        assert not lost, "\n".join(failures) or "a rank died"
        return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(self.world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(ends: list[Any]) -> None:
    connection = ends[dist.get_rank()]
    for end in ends:
        if end is not connection:
            end.close()  # or the end of that rank's process would not be seen
    while True:
        _keep_result(*connection.recv())
        connection.send(True)


def _work(rank: int, world_size: int, place: str, function: Callable, args: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of data loaders, as in what torchrun starts
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world_size)
    function(*args)
    dist.destroy_process_group()


def _keep_result(place: Path, function: Callable, args: tuple) -> None:
    try:
        torch.save(function(*args), place / f"{dist.get_rank()}.pt")
    except BaseException:
        (place / f"{dist.get_rank()}.error").write_text(traceback.format_exc())
        os._exit(1)  # not waiting for threads that wait for the other ranks
