"""Whether the weights of a potential have changed: by their bytes, which no way of changing them can leave as they are.

A tensor's version counter is not moved by fused optimizers, by what is written through ``.data``, nor by libraries that
average weights; and sums of weights do not see two of them swapped. So a copy of all parameters and buffers is kept and
compared: 0.1 ms for CHGNet, less than 1 % of the forces of eight silicon atoms.
"""

from __future__ import annotations

import operator
import threading
import uuid
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Version = tuple[uuid.UUID, ...]


def weights_version(*modules: nn.Module) -> Version:
    """The same for two calls only if no parameter and no buffer of these modules was changed or replaced in between.

    Tensors that are mere attributes are not looked at.
    """
    return tuple(_of(module).version(module) for module in modules)


def _of(module: nn.Module) -> _Weights:
    with _lock:
        if module not in _known:
            _known[module] = _Weights()
        return _known[module]


class _Weights:
    """The parameters and buffers of one module, as they were when they were last looked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: uuid.UUID | None = None
        self._places: list[Mapping[str, Any]] = []
        self._empty: list[Mapping[str, Any]] = []
        self._held: list[Any] = []
        self._plain: list[Tensor] = []
        self._scripted: list[nn.Module] = []
        self._copy = _Copy([])

    @torch.no_grad()
    def version(self, module: nn.Module) -> uuid.UUID:
        """A new one whenever anything has changed."""
        with self._lock:
            if self._version is None or self._replaced():
                self._walk(module)
                self._version = None
            tensors = self._tensors()
            if self._version is None or not self._copy.equals(tensors):
                self._copy, self._version = _Copy(tensors), uuid.uuid4()
            return self._version

    def _walk(self, module: nn.Module) -> None:
        """Find all places where a weight or a part of the module stands."""
        parts = list(module.modules())
        # TorchScript holds its own tensors, as many as at first.
        scripted = [part for part in parts if isinstance(part, torch.jit.ScriptModule)]
        self._scripted = [part for part in scripted if _scripted_tensors(part)]
        plain = [part for part in parts if not isinstance(part, torch.jit.ScriptModule)]
        places = [place for part in plain for place in (part._parameters, part._buffers, part._modules)]
        self._places, self._empty = [p for p in places if p], [p for p in places if not p]
        self._held = self._now()
        self._plain = [t for t in self._held if isinstance(t, Tensor)]

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(_VALUES, self._places)))

    def _replaced(self) -> bool:
        now = self._now()
        return any(self._empty) or len(now) != len(self._held) or not all(map(operator.is_, now, self._held))

    def _tensors(self) -> list[Tensor]:
        if not self._scripted:
            return self._plain
        return [*self._plain, *(t for part in self._scripted for t in _scripted_tensors(part))]


def _scripted_tensors(part: nn.Module) -> list[Tensor]:
    # By their dictionaries, for parameters() takes three times as long.
    return [t for held in (part._parameters, part._buffers) for t in held.values() if t is not None]


_VALUES = operator.methodcaller("values")
_lock = threading.Lock()
_known: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()


class _Copy:
    """A copy of the bytes of tensors, by which they are known again."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._aliases = [t.detach() for t in tensors]
        self._kinds = _kinds(tensors)
        self._in_place = all(_in_order_of_memory(t).is_contiguous() for t in tensors)
        self._on_host = self._in_place and all(t.is_cpu for t in tensors)
        self._bytes = _bytes(tensors, self._on_host)
        # A bytearray compares itself with an array as fast as memory can be read; elsewhere few calls are cheap.
        self._copies: list[Any] = list(map(bytearray if self._on_host else torch.cat, self._bytes))

    def equals(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these have the same shapes and the same bytes: NaN equals itself, and 0 is not -0."""
        known = self._bytes
        same_places = len(tensors) == len(self._aliases) and all(map(Tensor.is_set_to, tensors, self._aliases))
        if not (same_places and self._in_place):
            if _kinds(tensors) != self._kinds:
                return False
            known = _bytes(tensors, self._on_host)
        if self._on_host:
            return all(map(operator.eq, self._copies, known))
        return all(map(torch.equal, self._copies, map(torch.cat, known)))


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _bytes(tensors: Sequence[Tensor], on_host: bool) -> list[Any]:
    """The bytes where they lie: an array for each tensor on the host, elsewhere a list of tensors for each device."""
    pieces: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        flat = _in_order_of_memory(t.detach()).contiguous().view(-1)
        pieces.setdefault(t.device, []).append(flat.view(torch.uint8))
    return [piece.numpy() for some in pieces.values() for piece in some] if on_host else list(pieces.values())


def _in_order_of_memory(t: Tensor) -> Tensor:
    """With the dimensions in the order in which they lie, so that a permuted tensor is read without copying it."""
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True))
