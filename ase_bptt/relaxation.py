"""Relaxation as an iterated map: X(t+1) = step(X(t), F(X(t))) until the forces vanish.

This is the loop of arXiv 2512.01067. How one frame moves is the stepper's business, how the loop
is differentiated the adjoint's; here frames run until every structure has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from ase import Atoms
from torch import Tensor, nn

from .adjoints import Adjoint, Guided, Replay, make_adjoint
from .batch import Moving, Stopped
from .constraints import KNOWN, unknown
from .iterated_map import IteratedMap, Keep, Record
from .potential import Potential
from .potentials import as_potential
from .result import Relaxation, Status
from .stability import resolve_step_size
from .steppers import Stepper, make_stepper
from .structures import Structures


def relax(
    potential: Potential | nn.Module | str,
    structures: Structures | Atoms | Sequence[Atoms],
    *,
    stepper: Stepper | str | None = None,
    fmax: float = 0.05,
    steps: int = 200,
    adjoint: Adjoint | str | None = None,
    cell: str = "fixed",
) -> Relaxation:
    """Relax structures, differentiably; many are one batch.

    Parameters
    ----------
    potential : Potential, module or spec
        As for `load_potential`.
    structures : Structures, Atoms or list of Atoms
        The positions of Structures may require gradients.
    stepper : Stepper or str
        "fire" by default.
    fmax : float
        A structure stops where all its atoms feel less than this, in eV/Å.
    steps : int
        Frames at most.
    adjoint : Adjoint or str
        `Replay` by default; none under ``torch.no_grad()`` and where nothing requires gradients.
    cell : "fixed"
        Reserved for variable cells.

    Raises
    ------
    NotImplementedError
        For variable cells, and for constraints and elements that are not known, by name.
    """
    if cell != "fixed":
        raise NotImplementedError(f"Only cell='fixed' relaxes so far, got {cell!r}.")
    potential = as_potential(potential)
    start, sources, single = _batch(structures, potential)
    _refuse_constraints(start)
    potential.check(start)
    iterated = _map(potential, stepper, start)
    chosen = make_adjoint(adjoint) or Replay()
    inputs = (start.positions, start.cells, *iterated.parameters())
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if differentiable:
        chosen.check(iterated, start)
    guided = chosen if isinstance(chosen, Guided) else None
    run = Run(
        iterated,
        start,
        chosen.tolerance_of_forces(fmax),
        steps,
        keep=chosen.keep if differentiable else None,
        first=guided.first if guided else None,
        tail=_map(potential, guided.tail, start) if guided and guided.tail else None,
    )
    with torch.set_grad_enabled(differentiable and chosen.on_tape):
        run.go()
    if not differentiable:
        return run.relaxation(sources, single)
    early = guided.attach_early(run.early) if guided else None
    return run.relaxation(sources, single, chosen.attach(run.record), early)


def _map(potential: Potential, stepper: Stepper | str | None, structures: Structures) -> IteratedMap:
    # Its numbers stay where they are: what an optimizer holds of them must not be left behind on another device.
    return IteratedMap(potential, resolve_step_size(make_stepper(stepper), potential, structures))


def _batch(
    structures: Structures | Atoms | Sequence[Atoms], potential: Potential
) -> tuple[Structures, tuple[Atoms, ...] | None, bool]:
    if isinstance(structures, Structures):
        return structures.to(potential.device, potential.dtype), None, False
    single = isinstance(structures, Atoms)
    sources = (structures,) if isinstance(structures, Atoms) else tuple(structures)
    batch = potential.batch(sources)
    return batch, sources, single


def _refuse_constraints(structures: Structures) -> None:
    names = unknown(structures.constraint_names)
    if names:
        raise NotImplementedError(
            f"relax knows no way through the constraints {', '.join(names)}, and will not ignore them: "
            f"remove them, take one of {', '.join(KNOWN)}, or relax without a gradient by BPTTOptimizer."
        )


class Run:
    """Frames until every structure has stopped; those that stop leave the batch.

    Parameters
    ----------
    iterated : IteratedMap
    start : Structures
    fmax : float
        eV/Å at which a structure stops.
    steps : int
        Frames at most.
    keep : Keep or None
        Which frames' states are stored.
    first : int or None
        Take note of where the structures stand after so many frames.
    tail : IteratedMap or None
        Goes on after those, from a state of its own.
    """

    def __init__(
        self,
        iterated: IteratedMap,
        start: Structures,
        fmax: float,
        steps: int,
        *,
        keep: Keep | None = None,
        first: int | None = None,
        tail: IteratedMap | None = None,
    ):
        self.map, self.fmax, self.steps, self.keep = iterated, fmax, steps, keep
        self.first, self.tail = first, tail
        self.record = Record(iterated, start, nsteps=[0] * len(start), kept=keep or Keep())
        self.ends: dict[int, Stopped] = {}
        self.early_ends: dict[int, Stopped] = {}

    def go(self) -> None:
        """Run all frames."""
        moving = Moving(self.map, self.record.start, self.fmax, self.steps)
        members = list(range(len(moving)))
        for t in range(self.steps + 1):
            stopping = moving.look()
            if t == self.first:
                for k, whole in enumerate(members):
                    self.early_ends[whole] = Stopped.of(moving, k, stopping.get(k, Status.OUT_OF_STEPS))
            if stopping:
                for k, status in stopping.items():
                    self.record.nsteps[members[k]] = t
                    self.ends[members[k]] = Stopped.of(moving, k, status)
                members = [whole for k, whole in enumerate(members) if k not in stopping]
                if not members:
                    break
                moving.leave(stopping)
            if t == self.first and self.tail is not None:
                moving.turn(self.tail)
            if self.keep is not None and (self.first is None or t < self.first):
                self.record.keep(moving.structures.positions, moving.state, moving.forces)
            moving.advance()
        _conclude(self.record, self.ends)

    @cached_property
    def early(self) -> Record:
        """The record of the first frames alone."""
        assert self.first is not None
        record = replace(self.record, nsteps=[min(n, self.first) for n in self.record.nsteps])
        _conclude(record, self.ends | self.early_ends)
        return record

    def relaxation(
        self,
        sources: tuple[Atoms, ...] | None,
        single: bool,
        positions: Tensor | None = None,
        early: Tensor | None = None,
    ) -> Relaxation:
        """The whole batch; with these positions, where a gradient is attached to them."""
        before = None
        if early is not None:
            before = _relaxation(self.early, self.ends | self.early_ends, early, sources, single)
        final = self.record.final if positions is None else positions
        return _relaxation(self.record, self.ends, final, sources, single, before)


def _conclude(record: Record, ends: dict[int, Stopped]) -> None:
    every = [ends[k] for k in range(len(record.start))]
    record.final = torch.cat([end.positions for end in every])
    record.relaxed = [end.status is Status.CONVERGED for end in every]


def _relaxation(
    record: Record,
    every: dict[int, Stopped],
    positions: Tensor,
    sources: tuple[Atoms, ...] | None,
    single: bool,
    early: Relaxation | None = None,
) -> Relaxation:
    ends = [every[k] for k in range(len(record.start))]
    return Relaxation(
        start=record.start,
        positions=positions,
        forces=torch.cat([end.forces for end in ends]),
        nsteps=torch.tensor(record.nsteps, device=positions.device),
        status=tuple(end.status for end in ends),
        early=early,
        _energies=torch.stack([end.energy for end in ends]),
        _record=record,
        _sources=sources,
        _single=single,
        _members=tuple(range(len(ends))),
    )
