"""A compiled forward for relaxing many: the forces of any batch by code that torch.compile makes for a few sizes.

Energy and gradient are traced together, as operations on tensors of fixed sizes, and compiled. A batch is padded to
such a size by one more structure, whose edges are loops of its last atom just below the cutoff: energies and forces of
the others do not depend on it. So one compilation serves any batch that fits, whichever structures leave and join it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..neighbors import Edges
from ..potential import NO_GRADIENT, Potential
from ..structures import Structures
from ..threads import quiet, tracing, view
from ..utils import autograd_enabled, in_short, savable
from .memory import ran_out

log = logging.getLogger(__name__)
UNCOMPILED = "The forces of this {family} potential are computed uncompiled, in more time, because {why}."
FIRST, WINDOW, MOST = 10, 100, 4
"""Calls before the first size is compiled for; those of which half must find one that fits; sizes at most."""
WORTHWHILE = 0.6
"""Share of a size below which the padding of a batch would cost more than is saved."""
STEPS = 8
"""Sizes between one and its double, few enough that another run finds the same ones compiled."""
TOLERANCES = {torch.float64: 1e-8}
"""eV and eV/Å, or of the largest value where that is above 1: what may differ; 1e-4 in lower precision."""
FAR = 50.0
"""Å, the cell of the structure that pads a batch."""
PER_EDGE = ("i", "j", "shifts", "mirror", "one_way_first")
Sizes = tuple[int, ...]  # structures, atoms, edges, and lengths of the indices that a family adds
Key = tuple[Sizes, bool]  # and whether cells move


@runtime_checkable
class HasIndices(Protocol):
    """A `Potential` whose forward takes whole numbers out of tensors, and which is compiled without that part."""

    def indices(self, structures: Structures, edges: Edges) -> list[Tensor] | None:
        """Indices of edges, of any lengths, that follow from the geometry; None for a batch not to be compiled."""

    def energies_from(self, structures: Structures, edges: Edges, indices: Sequence[Tensor]) -> Tensor:
        """Energies in eV, shape (n,), by tensors of which no value is looked at in Python."""


def compiled(potential: Potential, backend: str | Callable[..., Any] = "inductor") -> Potential:
    """The same potential, whose forces are computed by compiled code where no gradient of them is asked for.

    Until a size is known that is worth compiling for, for batches that fit no compiled size, and where compiling fails,
    they are computed as without; a failure is reported by one warning.

    Parameters
    ----------
    potential : Potential
        Not changed; both share their weights. For the same potential the same is returned, with all that is compiled.
    backend : str or callable
        Of `torch.compile`.
    """
    key = (backend, *((id(t), t.data_ptr()) for t in (*potential.parameters(), *potential.buffers())))
    with _lock:
        known = _known.get(potential)
        if known is None or known[0] != key:
            made = view(potential)
            vars(made)["energy_and_forces"] = CompiledForces(view(potential), backend)
            _known[potential] = known = key, made
        return known[1]


_lock, _compiling = threading.Lock(), threading.Lock()
_known: WeakKeyDictionary[nn.Module, tuple[Any, Potential]] = WeakKeyDictionary()


class CompiledForces:
    """`Potential.energy_and_forces` of one potential, by compiled code where there is some that fits.

    Attributes
    ----------
    compilations : int
        How often the backend was called.
    seconds : float
        Processor time of the threads that compiled.
    n_compiled, n_calls : int
        Calls that compiled code has answered, of how many.
    """

    def __init__(self, potential: Potential, backend: str | Callable[..., Any]):
        self.potential = potential
        self.compilations, self.n_compiled, self.n_calls, self.seconds = 0, 0, 0, 0.0
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self._graphs: dict[Key, Callable[..., tuple[Tensor, ...]]] = {}
        self._seen: deque[tuple[Key, bool]] = deque(maxlen=WINDOW)
        self._padded: tuple[Edges, Sizes, dict[str, Tensor]] | None = None
        self._given_up = False
        if not potential.conservative:
            self._give_up("they are predicted directly, by no gradient")

    def __call__(self, structures: Structures, edges: Edges, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """As `Potential.energy_and_forces`."""
        eager = self.potential.energy_and_forces
        if create_graph or self._given_up:
            return eager(structures, edges, create_graph=create_graph)
        self.n_calls += 1
        try:
            found = self._by_compiled(structures, edges)
        except Exception as error:
            if ran_out(error):
                raise
            self._give_up(f"compiling has failed ({in_short(getattr(error, 'inner_exception', error))})")
            found = None
        if found is None:
            return eager(structures, edges)
        self.n_compiled += 1
        # At the calls 1, 2, 4, 8 and so on: with other batches, too, and at hardly any cost.
        if self.n_compiled & (self.n_compiled - 1) == 0:
            expected = eager(structures, edges)
            for name, values, right in zip(("energies", "forces"), found, expected, strict=True):
                off, allowed = _difference(values, right), TOLERANCES.get(right.dtype, 1e-4)
                if not off <= allowed:
                    self._give_up(f"compiled {name} are off by {off:.1e}, of which {allowed:.0e} is allowed")
                    return expected
        return found

    def _give_up(self, why: str) -> None:
        self._given_up = True
        log.warning("%s", UNCOMPILED.format(family=self.potential.family, why=why))

    def _by_compiled(self, structures: Structures, edges: Edges) -> tuple[Tensor, Tensor] | None:
        """Energies and forces; None where no compiled size fits."""
        with autograd_enabled():
            structures, edges = savable(structures), savable(edges)
            rows = structures.positions.detach().requires_grad_()
            moved = structures.replace(positions=rows)
            placed, work = moved.placed(), moved.work()
        with autograd_enabled(False):
            batch = placed.replace(positions=placed.positions.detach(), cells=placed.cells.detach())
            indices = self.potential.indices(batch, edges) if isinstance(self.potential, HasIndices) else []
            if indices is None or edges.mirror is None:
                return None
            key = self._size_for((len(batch), batch.n_atoms, len(edges.i), *map(len, indices)), placed is not moved)
            inputs = {} if key is None else self._pad(batch, edges, indices, key[0])
            if key is None or (key not in self._graphs and not self._compile(key, inputs)):
                return None
            energy, *gradients = self._graphs[key](*inputs.values())
        energy, gradient = energy[: len(batch)], gradients[0][: batch.n_atoms]
        if placed is not moved:
            ends, gradients = [placed.positions, placed.cells], [gradient, gradients[1][: len(batch)]]
            if work is not None:
                energy, ends, gradients = energy + work.detach(), [*ends, work], [*gradients, torch.ones_like(work)]
            (gradient,) = torch.autograd.grad(ends, [rows], gradients)
        return energy, -gradient

    def _size_for(self, sizes: Sizes, moves: bool) -> Key | None:
        """The compiled size that a batch fits, or one that is now to be compiled for; None where there is neither."""
        known = [size for size, free in list(self._graphs) if free is moves]  # other threads may add theirs
        fitting = [size for size in known if _fits(sizes, size)]
        self._seen.append(((sizes, moves), bool(fitting)))
        if fitting:
            return min(fitting, key=lambda size: size[2]), moves
        missed = [seen for (seen, free), found in list(self._seen) if free is moves and not found]
        enough = WINDOW / 2 if known else FIRST
        if len(missed) < enough or len(self._graphs) >= MOST:
            return None
        size = _rounded(tuple(map(max, zip(*missed, strict=True))))
        return (size, moves) if _fits(sizes, size) else None

    def _compile(self, key: Key, inputs: dict[str, Tensor]) -> bool:
        """Trace and compile for a size; False where another thread is at it, for tracing serves no two at once."""
        if not _compiling.acquire(blocking=False):
            return False
        began = time.thread_time()
        try:
            with quiet(), autograd_enabled():
                traced = _traced(self.potential, inputs, n=key[0][0], moves=key[1])
            graph = torch.compile(traced, backend=self._counted, dynamic=False, fullgraph=True)
            with quiet(), autograd_enabled(False):
                graph(*inputs.values())
            self._graphs[key] = graph
            self._seen.clear()
        finally:
            self.seconds += time.thread_time() - began
            _compiling.release()
        return True

    def _counted(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        assert self.compilations <= 2 * MOST, "torch compiles the same code again and again"
        return self._backend(graph, inputs)

    def _pad(self, batch: Structures, edges: Edges, indices: Sequence[Tensor], size: Sizes) -> dict[str, Tensor]:
        """The tensors of a batch, padded to a size."""
        n, atoms, n_edges, *lengths = size
        known = self._padded  # read once: other threads may put theirs there
        if known is None or known[0] is not edges or known[1] != size:
            self._padded = known = edges, size, _padded_edges(edges, atoms, n_edges, self.potential.cutoff)
        more = atoms - batch.n_atoms
        places = 3.0 * torch.arange(more).to(batch.positions)[:, None].expand(-1, 3)
        cell = FAR * torch.eye(3).to(places)
        return {
            "positions": torch.cat((batch.positions, places)),
            "numbers": torch.cat((batch.numbers, batch.numbers[:1].expand(more))),
            "masses": _filled(batch.masses, atoms, 1.0),
            "batch": _filled(batch.batch, atoms, n - 1),
            "cells": torch.cat((batch.cells, cell.expand(n - len(batch), 3, 3))),
            **{name: _filled(getattr(batch, name), n, x) for name, x in (("pbc", True), ("charges", 0), ("spins", 1))},
            **known[2],
            **{f"index_{k}": _filled(x, lengths[k], n_edges - 1) for k, x in enumerate(indices)},
        }


class _Counts(Sequence[int]):
    """Stands for the numbers of atoms: of how many structures they are is fixed, what they are is not."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: Any) -> Any:
        raise NotImplementedError("the forward takes the numbers of atoms from Structures.counts")


def _traced(potential: Potential, inputs: dict[str, Tensor], *, n: int, moves: bool) -> GraphModule:
    """Energies and their gradients by positions and, where cells move, by cells, as a graph for these sizes."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        wanted = [given[name].detach().requires_grad_() for name in ("positions", "cells")[: 1 + moves]]
        given |= dict(zip(("positions", "cells"), wanted, strict=False))
        indices = [given.pop(name) for name in inputs if name.startswith("index_")]
        batch, *ends, order = (given.pop(name) for name in ("batch", *PER_EDGE))
        structures = Structures(**given, counts=_Counts(n), constraints=((),) * n)  # type: ignore[arg-type]
        edges = Edges(*ends)
        vars(structures)["batch"], vars(edges)["one_way_first"] = batch, order
        if isinstance(potential, HasIndices):
            energy = potential.energies_from(structures, edges, indices)
        else:
            energy = potential(structures, edges).energy
        found = torch.autograd.grad(energy.sum(), wanted, allow_unused=True) if energy.requires_grad else [None]
        if found[0] is None:
            raise RuntimeError(NO_GRADIENT.format(family=potential.family))
        return energy.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))

    from torch.fx.experimental.proxy_tensor import make_fx  # takes time to import

    graph = make_fx(tracing()(run))(*inputs.values())
    # The potential's own memory, whatever of its weights requires gradients at the moment.
    for name, value in [*graph.named_parameters(), *graph.named_buffers()]:
        delattr(graph, name)
        graph.register_buffer(name, value.detach())
    return graph


def _fits(sizes: Sizes, size: Sizes) -> bool:
    """Whether a batch fits a size, with room for the structure that pads it, and fills enough of it."""
    room = (1, 1, 2, *[1] * (len(size) - 3))
    return sizes[2] >= WORTHWHILE * size[2] and all(a + more <= b for a, more, b in zip(sizes, room, size, strict=True))


def _rounded(sizes: Sizes) -> Sizes:
    """A size with some room, rounded up to one of few, and even; structures without atoms cost nothing."""
    n, *others = sizes
    steps = (math.ceil(STEPS * math.log2(1.02 * size + 2)) / STEPS for size in others)
    return (2 ** (4 * n).bit_length(), *(2 * math.ceil(2**step / 2) for step in steps))


def _filled(values: Tensor, length: int, value: Any) -> Tensor:
    """Values of a first axis that is made longer."""
    return torch.cat((values, values.new_full((length - len(values), *values.shape[1:]), value)))


def _padded_edges(edges: Edges, atoms: int, n_edges: int, cutoff: float) -> dict[str, Tensor]:
    """With loops of the last atom, which are there both ways."""
    k = n_edges - len(edges.i)
    i, j = (_filled(ends, n_edges, atoms - 1) for ends in (edges.i, edges.j))
    loops = edges.shifts.new_zeros(k, 3)
    loops[:, 0] = 0.999 * cutoff / FAR
    loops[k // 2 :] *= -1
    back = torch.arange(k, device=i.device).roll(k // 2) + len(edges.i)
    padded = Edges(i, j, torch.cat((edges.shifts, loops)), torch.cat((edges.mirror, back)))  # type: ignore[arg-type]
    return {name: getattr(padded, name) for name in PER_EDGE}


def _difference(values: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value where that is above 1; where the expected ones are finite."""
    known = expected.isfinite()
    off, scale = (x.where(known, 0.0).abs().amax() for x in (values - expected, expected))
    return float(off / scale.clamp(min=1.0))
