"""Relaxation as an iterated map: X(t+1) = step(X(t), F(X(t))) until the forces vanish.

This is the loop of arXiv 2512.01067. How one frame moves is the stepper's business, how the loop
is differentiated the adjoint's; here frames run until every structure has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase import Atoms
from torch import nn

from .adjoints import Adjoint, Guided, Replay, make_adjoint
from .constraints import KNOWN, unknown
from .frames import IteratedMap
from .loading import as_potential
from .potential import Potential
from .result import Relaxation
from .runs import Run
from .stability import steady
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
    return IteratedMap(potential, steady(make_stepper(stepper), potential, structures))


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
