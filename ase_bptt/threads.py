"""What other packages do to the whole process, kept to the thread in which they do it.

Packages of potentials print, warn, draw random weights and build their modules in torch's default dtype. Standard
output, the filters of warnings, torch's generator and its default dtype belong to the whole process: to swap them, even
for a moment, would reach every other thread, and two threads that swap them at once may leave them swapped.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_here = threading.local()
_lock = threading.Lock()


class _Quiet:
    """How many threads are within `quiet`, and what is kept from them."""

    inside: ClassVar[int] = 0

    def match(self, text: str) -> bool:
        """As the pattern of a filter of warnings: whatever the text, where this thread is quiet."""
        return getattr(_here, "depth", 0) > 0


class _StandardOutput:
    """Standard output without what quiet threads write."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if _QUIET.match(text) else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_QUIET = _Quiet()
_FILTER: Any = ("ignore", _QUIET, Warning, None, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread prints to standard output, and its warnings; those of other threads are not affected.

    Standard output is replaced by a stream that passes on what the other threads write, and is put back when the last
    thread leaves.
    """
    with _lock:
        _Quiet.inside += 1
        if not isinstance(sys.stdout, _StandardOutput):
            sys.stdout = _StandardOutput(sys.stdout)
        if warnings.filters[:1] != [_FILTER]:
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _Quiet.inside -= 1
            if not _Quiet.inside:
                if isinstance(sys.stdout, _StandardOutput):
                    sys.stdout = sys.stdout.stream
                while _FILTER in warnings.filters:
                    warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]


@contextmanager
def tracing() -> Iterator[None]:
    """Within it this thread records what it computes, for other values of the same shapes."""
    _here.traced = True
    try:
        yield
    finally:
        _here.traced = False


def is_traced() -> bool:
    """Whether what this thread computes is recorded, so that nothing may be looked up by the values of a tensor."""
    return getattr(_here, "traced", False)


class Watching(threading.Thread):
    """A thread that computes nothing."""


def alone() -> bool:
    """Whether no other thread computes in this process; tqdm's, which watches its bars, does not, nor does ours."""
    return threading.active_count() == 1 or all(
        t is threading.current_thread() or isinstance(t, Watching) or type(t).__name__ == "TMonitor"
        for t in threading.enumerate()
    )


def view(module: nn.Module, **children: Any) -> Any:
    """A module that shares all with another one, but for these children and for attributes that are set on it.

    For what would otherwise have to be changed, for the time of a call, in a module that other threads may be using.
    The children may be functions.
    """
    new = object.__new__(type(module))
    vars(new).update(vars(module), _modules=dict(module._modules) | children)
    return new


FACTORIES: frozenset[Any] = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor, torch.as_tensor, torch.arange}
    | {torch.linspace, torch.logspace, torch.rand, torch.randn}
)
"""What makes tensors in the default dtype."""
RANDOM: frozenset[Any] = frozenset(
    {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli}
    | {Tensor.normal_, Tensor.uniform_, Tensor.random_, Tensor.bernoulli_, Tensor.exponential_}
    | {nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_}
    | {nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.sparse_}
)
"""What draws from torch's generator where it is given no other."""


_building = threading.RLock()


class Building(TorchFunctionMode):
    """Within it this thread builds modules in a dtype, and draws their first weights from a generator of its own.

    A package that asks for torch's default dtype is given this one instead; that default, torch's random numbers and
    other threads stay as they are. One thread builds at a time: TorchScript's compiler serves no two at once. Where one
    is within another, the inner one decides.

    Parameters
    ----------
    dtype : torch.dtype or None
        None keeps torch's default.
    seed : int
        Of the random numbers, which are those of ``torch.manual_seed(seed)``.
    """

    def __init__(self, dtype: torch.dtype | None = None, seed: int = 0):
        super().__init__()
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.outer: Building | None = None

    def __enter__(self) -> Building:
        _building.acquire()
        self.outer = getattr(_here, "building", None)
        _here.building = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _here.building = self.outer
        _building.release()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _here.building is not self:
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:  # a constant: the draws have a seed, and a dtype, of their own
            return function(*args, **kwargs)
        if function in RANDOM and _device(args, kwargs).type == "cpu":
            kwargs["generator"] = self.generator
        default = torch.get_default_dtype()
        if self.dtype in (None, default):
            return function(*args, **kwargs)
        args = tuple(self.dtype if x is default else x for x in args)
        kwargs = {name: self.dtype if x is default else x for name, x in kwargs.items()}
        found = function(*args, **kwargs)
        if function in FACTORIES and kwargs.get("dtype") is None and found.dtype is default:
            found = function(*args, **{**kwargs, "dtype": self.dtype})
        return found


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a function draws: where the tensor lies that it fills, or where it makes one."""
    first = args[0] if args else kwargs.get("tensor")
    if isinstance(first, Tensor):
        return first.device
    return torch.device(kwargs.get("device") or torch.get_default_device())
