"""How much memory a computation takes at its peak, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of all tensors that are alive together at most while `run` runs, of those that it makes or uses.

    Counted from the tensors themselves, so that neither other processes nor what an allocator holds back matter.
    """
    with _Live() as live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the storages that operations give, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._sizes:
            return
        self._sizes[place] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self._live -= self._sizes.pop(place, 0)
