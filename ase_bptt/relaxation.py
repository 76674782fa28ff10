"""Relaxation as an iterated map: X(t+1) = step(X(t), F(X(t))) until the forces vanish.

`Loop.run` is the loop of arXiv 2512.01067, to be read first. How one frame moves is the stepper's business
(`ase_bptt.steppers`), how the loop is differentiated the adjoint's (`ase_bptt.adjoints`), which is given the loop and
runs it; which structure is where is the batch's (`ase_bptt.batch`). Where nothing requires gradients and structures are
many, `ase_bptt.throughput.InFlight` drives the same batch, with a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from .adjoints import Adjoint, Attached, Replay, make_adjoint
from .batch import Batch
from .cells import CellFreedom, freedoms
from .cells.strained import Strained
from .constraints import KNOWN, unknown
from .iterated_map import Checkpointing, End, IteratedMap, Status, Trajectory
from .potential import Potential
from .potentials import as_potential
from .result import Relaxation
from .stability import resolve_step_size
from .steppers import Stepper, make_stepper
from .structures import Structures
from .utils import outside_inference_mode


class Loop:
    """The frames of a batch until every structure has stopped; those that stop leave the batch.

    Parameters
    ----------
    potential : Potential
    stepper : Stepper, str or None
        A step size that is "auto" is resolved on the structures.
    start : Structures
        Its positions and cells may require gradients.
    fmax : float
        eV/Å below which a structure stops.
    steps : int
        Frames at most.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import Structures, load_potential
    >>> from ase_bptt.relaxation import Loop
    >>> start = Structures.from_atoms([molecule("N2")])
    >>> loop = Loop(load_potential("emt"), "fire", start, fmax=0.05, steps=100)
    >>> trajectory = loop.run(frames=3)
    >>> trajectory.map is loop.map
    True
    """

    def __init__(
        self, potential: Potential, stepper: Stepper | str | None, start: Structures, *, fmax: float, steps: int
    ):
        self.start, self.fmax, self.steps = start, fmax, steps
        self.map = self._map = _iterated_map(potential, stepper, start)  # of the first frames, and of those to come
        self._ends: dict[int, End] = {}

    @cached_property
    def _batch(self) -> Batch:
        return Batch(self._map, self.start, self.fmax, self.steps)

    def run(self, *, frames: int | None = None, checkpointing: Checkpointing | None = None) -> Trajectory:
        """Run until every structure has stopped, or has taken so many frames; a second call continues from there.

        Where gradients are enabled autograd records every frame; adjoints that need no tape run it without.

        Parameters
        ----------
        frames : int or None
            Counted from the start, not from the last call; None is the loop's steps.
        checkpointing : Checkpointing or None
            The frames whose states the trajectory keeps; None keeps none.

        Returns
        -------
        Trajectory
            Its structures that have not stopped are at their last frame so far, with the status OUT_OF_STEPS.

        Raises
        ------
        ValueError
            For checkpointing where the run continues: a trajectory is kept from its start.
        """
        batch, last = self._batch, self.steps if frames is None else min(frames, self.steps)
        first = batch.frames[0] if len(batch) else last + 1
        if checkpointing is not None and (first > 0 or self._ends):
            raise ValueError("A trajectory is kept from its start: give checkpointing to the first run of a loop.")
        trajectory = Trajectory(self.map, self.start, checkpointing)
        trajectory.end(self._ends)
        for t in range(first, last + 1):
            forces = batch.evaluate()  # F(X(t))
            # X(t+1) = step(X(t), F(X(t))), before it is known who stops: both need one transfer from the device.
            following = self._map.advance(batch.structures, batch.state, forces)
            stopped = batch.stopped(following)  # forces below fmax, out of steps, or not finite
            left = batch.remove(stopped)
            trajectory.end(left)
            if not len(batch) or t == last:
                break
            if left:  # the others again, by themselves
                del following
                following = self._map.advance(batch.structures, batch.state, batch.forces)
            if checkpointing is not None:
                trajectory.keep(batch.structures.positions, batch.state, batch.forces)
            batch.move(following)
        self._ends = dict(trajectory.ends)
        trajectory.end(batch.ends(dict.fromkeys(range(len(batch)), Status.OUT_OF_STEPS)))
        return trajectory

    def switch(self, stepper: Stepper | str | None) -> None:
        """Have another stepper take the frames to come, from its first state; None changes nothing."""
        if stepper is not None:
            self._map = _iterated_map(self.map.potential, stepper, self.start)
            if "_batch" in vars(self):
                self._batch.restart(self._map)


@outside_inference_mode
def relax(
    potential: Potential | nn.Module | str,
    structures: Structures | Atoms | Sequence[Atoms],
    *,
    stepper: Stepper | str | None = None,
    fmax: float = 0.05,
    steps: int = 200,
    adjoint: Adjoint | str | None = None,
    cell: Any = "fixed",
    pressure: float | Sequence[float] | Tensor = 0.0,
    warm_start: Structures | Sequence[Atoms] | None = None,
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
        A structure stops where all its atoms feel less than this, in eV/Å; and where its cell moves, where each row of
        its virial divided by the number of atoms is smaller, too, as in ASE.
    steps : int
        Frames at most.
    adjoint : Adjoint or str
        `Replay` by default. Under ``torch.no_grad()``, and where nothing requires gradients, it attaches none, and
        only decides how far to relax (`Implicit`: to its fmax) and by which steppers (`Guided`).
    cell : str, mask or CellFreedom, or a sequence of them
        What moves beside the atoms, as under ASE's FrechetCellFilter: "fixed", "full", "hydrostatic" (volume alone),
        "constant-volume" (shape alone), or a mask of the strain, six numbers (xx, yy, zz, yz, xz, xy) or 3 x 3. One for
        all, or one for each structure. In slabs and wires only the periodic directions move.
    pressure : float, sequence of float, or Tensor of shape () or (n,)
        In eV/Å^3, as in ASE; of cells that move. A Tensor may require gradients.
    warm_start : Structures or list of Atoms, optional
        The same structures near their minima, for adjoints that need the minimum and not the path to it: the
        relaxation to the minimum starts there.

    Returns
    -------
    Relaxation
        Positions and cells in Å, energies in eV; print it for a line each.

    Raises
    ------
    NotImplementedError
        For constraints and elements that are not known, by name; for cells that move with a potential that has no
        stress, or along a lone shear.
    TypeError
        For a stepper that cannot be differentiated where the adjoint goes through its frames.
    ValueError
        For unknown names of steppers, adjoints and cells, for a structure without periodicity whose cell is to move,
        and for a pressure on a cell that is fixed.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import load_potential, relax
    >>> potential = load_potential("lj")
    >>> structures = [bulk("Ar", a=1.56).repeat(2) for _ in range(2)]
    >>> for k, atoms in enumerate(structures):
    ...     atoms.rattle(0.05, seed=k)
    >>> relaxation = relax(potential, structures, stepper="fire", steps=20)
    >>> print(relaxation)
    Relaxation[0]: Ar8, out of steps after 20 frames, energy -63.3284 eV, fmax 0.1562 eV/Å
    Relaxation[1]: Ar8, out of steps after 20 frames, energy -63.3282 eV, fmax 0.2858 eV/Å
    >>> relaxation.energies.sum().backward()
    >>> print(f"dE/depsilon = {potential.epsilon.grad:.2f}")
    dE/depsilon = -126.65

    Where the cell moves, `cells` is attached, too:

    >>> relaxation = relax(potential, bulk("Ar", a=1.6), cell="full", fmax=1e-3)
    >>> volume = torch.linalg.det(relaxation.cells[0])
    >>> potential.zero_grad(); volume.backward()
    >>> print(f"V = {volume:.4f} Å^3, dV/dsigma = {potential.sigma.grad:.2f} Å^2")
    V = 0.9245 Å^3, dV/dsigma = 2.77 Å^2
    """
    potential = as_potential(potential)
    start, sources, single = _structures(structures, potential)
    rows = partial(_rows, potential=potential, stepper=stepper, cell=cell, pressure=pressure)
    given, start = start, rows(start)
    chosen = make_adjoint(adjoint) or Replay()
    fmax = chosen.required_fmax(fmax)
    loop = Loop(potential, stepper, start, fmax=fmax, steps=steps)
    inputs = (start.positions, *start.conditions(), *loop.map.parameters())
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        trajectory = chosen.run(loop)
        return Relaxation.of(Attached(trajectory, trajectory.final), sources, single)
    chosen.check(loop.map, start)
    warm = None
    if warm_start is not None:
        near, *_ = _structures(warm_start, potential)
        if not chosen.needs_minimum:
            raise ValueError(
                f"A warm start is for adjoints that need the minimum, and {chosen.name!r} needs the path: take "
                "'implicit', 'guided' or 'one-step', or leave the warm start out."
            )
        if near.counts != given.counts or not torch.equal(near.numbers, given.numbers):
            raise ValueError("The warm start has other atoms than the structures: give the same in the same order.")
        near = rows(near)
        chosen.check(loop.map, near)
        warm = Loop(potential, stepper, near, fmax=fmax, steps=steps)
    return Relaxation.of(chosen.apply(loop, warm=warm), sources, single)


def _rows(
    start: Structures, potential: Potential, stepper: Stepper | str | None, cell: Any, pressure: Any
) -> Structures:
    """The rows to relax: atoms alone where every cell is fixed."""
    of_cells = freedoms(cell, pressure.tolist() if isinstance(pressure, Tensor) else pressure, len(start))
    if not any(freedom.moves for freedom in of_cells):
        return start
    live = pressure.expand(len(start)) if isinstance(pressure, Tensor) else None
    return rows_of(start, of_cells, IteratedMap(potential, make_stepper(stepper)), pressures=live)


def rows_of(
    structures: Structures, cells: Sequence[CellFreedom], iterated: IteratedMap, pressures: Tensor | None = None
) -> Strained:
    """The rows by which structures whose cells move are relaxed, scaled as the stepper needs them.

    Raises
    ------
    NotImplementedError
        For a potential without a stress.
    ValueError, NotImplementedError
        As `Strained.of`.
    """
    if not iterated.potential.conservative:
        raise NotImplementedError(
            f"The forces of this {iterated.potential.family} potential are predicted directly, and it has no stress, "
            "so that no cell can be relaxed: take cell='fixed' (--cell fixed in the shell)."
        )
    return Strained.of(structures, cells, pressures=pressures, balanced=iterated.stepper.scale_sensitive)


def _iterated_map(potential: Potential, stepper: Stepper | str | None, structures: Structures) -> IteratedMap:
    # Its hyperparameters stay where they are: what an optimizer holds of them must not be left on another device.
    return IteratedMap(potential, resolve_step_size(make_stepper(stepper), potential, structures))


def _structures(
    structures: Structures | Atoms | Sequence[Atoms], potential: Potential
) -> tuple[Structures, tuple[Atoms, ...] | None, bool]:
    """The batch, the Atoms that it is of, and whether it was one Atoms object; refused where it cannot be relaxed."""
    if isinstance(structures, Structures):
        return _checked(structures.to(potential.device, potential.dtype), potential), None, False
    single = isinstance(structures, Atoms)
    sources = (structures,) if isinstance(structures, Atoms) else tuple(structures)
    return _checked(potential.batch(sources), potential), sources, single


def _checked(structures: Structures, potential: Potential) -> Structures:
    names = unknown(structures.constraint_names)
    if names:
        raise NotImplementedError(
            f"relax cannot differentiate the constraints {', '.join(names)}, and does not ignore them: "
            f"remove them, take one of {', '.join(KNOWN)}, or relax without a gradient by BPTTOptimizer."
        )
    potential.check(structures)
    return structures
