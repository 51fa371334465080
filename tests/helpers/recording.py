"""What a CUDA graph does, on the CPU: the operators of a step are noted once, and done again on the same tensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llava_cot.engine.graphs import Recorder, Step


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        """A value that Python looked at, or computed with, is the one that it was."""
        now: dict[int, torch.Tensor] = {}  # of what a recorded call made, what it makes this time

        def current(leaf: Any) -> Any:
            return now.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf

        for function, args, kwargs, before in self.calls:
            after = function(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = new


class Noting(Recorder):
    """Replays the noted operators of a step; ``monkeypatch.setattr(runner, "open_recorder", Noting)``."""

    def __init__(self, device: torch.device):
        pass

    def capture(self, step: Step) -> Step:
        step()
        recording = Recording()
        with torch.inference_mode(), recording:
            step()
        assert len(recording.calls) > 50
        return torch.inference_mode()(recording.replay)
