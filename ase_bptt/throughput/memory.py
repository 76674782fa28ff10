"""How much memory a batch takes, and how a computation continues in smaller parts where it runs out."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ase import Atoms
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..neighbors import search_each
from ..potential import Potential

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SHARE = 0.8
"""Of the free memory that may be used; the rest is for what allocators round up."""
COUNTED = 64
"""Structures whose edges are counted at once."""
CPU = torch.device("cpu")
SIGNS = ("can't allocate memory", "out of memory", "OutOfMemoryError", "ALLOC_FAILED")
"""In the text of errors that say that memory ran out."""
Found = TypeVar("Found")


class Size(NamedTuple):
    """Atoms and edges of a structure."""

    atoms: int
    edges: int


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak, as the sum of a share for the batch, for each atom and for each edge.

    Attributes
    ----------
    fixed, per_atom, per_edge : float
        In bytes.
    """

    fixed: float
    per_atom: float
    per_edge: float

    def of(self, size: Size) -> float:
        """Bytes that a structure adds to a batch."""
        # At least one byte, so that a batch always ends.
        return max(1.0, self.per_atom * size.atoms + self.per_edge * size.edges)


def sizes(potential: Potential, structures: Sequence[Atoms]) -> list[Size]:
    """Atoms and edges of each structure."""
    counted: list[Size] = []
    for first in range(0, len(structures), COUNTED):
        some = structures[first : first + COUNTED]
        found = search_each(potential.batch(some), potential.cutoff)
        counted += [Size(len(atoms), len(edges.i)) for atoms, edges in zip(some, found, strict=True)]
    return counted


def measure(
    run: Callable[[list[Item]], Any], items: Sequence[Item], of: Sequence[Size], device: torch.device = CPU
) -> Footprint:
    """The footprint of a computation, from its peaks on a few batches of the smallest and the largest items.

    Parameters
    ----------
    run : callable
        ``run(items)``, whose memory is measured; it is called up to five times.
    items : sequence
    of : sequence of Size
        Their sizes.
    device : torch.device
        Where it computes.

    Raises
    ------
    MemoryError
        Where not even the smallest item fits, saying what to do.
    """
    order = sorted(range(len(items)), key=lambda k: of[k])
    small, large = order[0], order[-1]
    rows, peaks = [], []
    # The first allocates what is allocated at first use, and is measured again.
    for batch in ([small], [small], [small, small], [large], [small, large]):
        found = fits(partial(peak_bytes, partial(run, [items[k] for k in batch]), device))
        if found is None:
            continue
        peak = found[0][1]
        del found  # what was computed must not be there beside the next batch
        rows.append([1.0, sum(of[k].atoms for k in batch), sum(of[k].edges for k in batch)])
        peaks.append(max(1, peak))
    if not peaks:
        report_out_of_memory(1)
    return _fitted(np.array(rows[1:] or rows), np.array(peaks[1:] or peaks, dtype=float))


def _fitted(rows: np.ndarray, peaks: np.ndarray) -> Footprint:
    """Bytes for each batch, atom and edge that give these peaks."""
    if len(rows) < rows.shape[1]:
        return Footprint(0.0, float((peaks / rows[:, 1]).max()), 0.0)
    # Each batch counts by its relative error; nothing can take less than no memory.
    (fixed, per_atom, per_edge), _ = nnls(rows / peaks[:, None], np.ones(len(peaks)))
    return Footprint(fixed, per_atom, per_edge)


def free_bytes(device: torch.device) -> float:
    """Bytes of a GPU that may be used now; infinite elsewhere, where the system would swap and not refuse."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE * (free + cached)


def peak_bytes(run: Callable[[], Found], device: torch.device = CPU) -> tuple[Found, int]:
    """The result of `run`, and the bytes of tensors that were alive together at most, beyond those before it.

    On a GPU its allocator counts them. Elsewhere they are counted from the tensors that operations return, which takes
    time: the resident memory of a process would contain what the system's allocator has not given back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = run()
        return found, torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        found = run()
    return found, live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages of the tensors that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor._is_zerotensor():  # a derivative that vanishes: without a storage
            return
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


def in_parts(run: Callable[[list[Item]], Found], items: Sequence[Item]) -> Iterator[tuple[list[Item], Found]]:
    """The result of `run` for the items, all at once or, where memory runs out, for one half after the other.

    Parameters
    ----------
    run : callable
        ``run(items)``; where it fails it must have no effects, for its halves are run instead.
    items : sequence

    Yields
    ------
    (list, object)
        Each part of the items, in order, and its result.

    Raises
    ------
    MemoryError
        Where a single item does not fit.
    """
    waiting = [list(items)] if len(items) else []
    while waiting:
        part = waiting.pop()
        found = fits(partial(run, part))
        if found is not None:
            yield part, found[0]
            continue
        report_out_of_memory(len(part))
        half = (len(part) + 1) // 2
        waiting += [part[half:], part[:half]]


def fits(run: Callable[[], Found]) -> tuple[Found] | None:
    """The result of `run`; None where memory ran out, once all that it had allocated is free again."""
    try:
        return (run(),)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def report_out_of_memory(n: int) -> None:
    """Warn that n structures together were too many.

    Raises
    ------
    MemoryError
        Where it was a single one, saying what to do.
    """
    if n == 1:
        raise MemoryError(
            "Memory ran out on a single structure: use a device with more memory, a smaller potential, or an "
            "adjoint that keeps less, such as 'replay' or 'implicit'."
        )
    log.warning("Memory ran out on %d structures at once: continuing with half as many.", n)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises no class of its own, and TorchScript passes errors on as text.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
