"""What an ASE run leaves behind, from which its gradient is taken: the states before its frames, and its end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.filters import FrechetCellFilter
from torch import Tensor

from ..adjoints import Adjoint, Attached, make_adjoint
from ..calculator import TorchCalculator, same_but_positions
from ..charges import specified
from ..iterated_map import Checkpointing, End, IteratedMap, Status, Trajectory
from ..result import Relaxation
from ..steppers import GradientDescent, State, Stepper
from ..structures import Structures
from .cell_filters import CellRows, atoms_of, check_differentiable

PASSING = {"positions", "initial_charges", "initial_magmoms"}
"""What start and end of a relaxation may differ in."""


class Recording:
    """The states before each frame of a run on Atoms, or on their FrechetCellFilter, with a TorchCalculator.

    Parameters
    ----------
    stepper : Stepper
    kept : Checkpointing
        Which frames' states are stored.
    """

    def __init__(self, stepper: Stepper, kept: Checkpointing):
        self.stepper, self.kept = stepper, kept
        self.trajectory: Trajectory | None = None
        self._start: Structures | None = None
        self._started = Atoms()
        self._started_with: dict[str, Any] = {}
        self._cell: CellRows | None = None
        self._expected: np.ndarray | None = None

    def keep(self, target: Any, positions: Tensor, state: State) -> None:
        """Keep the state before a frame; start another trajectory where something else changed the atoms."""
        try:
            if self.trajectory is None or not self._continues(self.trajectory, target):
                self._begin(target)
        except (RuntimeError, NotImplementedError, ValueError):
            # What cannot be differentiated runs all the same; `relaxation` says why.
            return
        assert self.trajectory is not None
        self.trajectory.keep(positions if self._cell is None else self._cell.from_ase(positions), state)

    def _begin(self, target: Any) -> None:
        """Start a trajectory; raise where this target cannot be differentiated through its frames."""
        atoms, cell, start = _check_frames(target)
        with torch.no_grad():
            rows = start if cell is None else cell.strained(start)
        self.trajectory = Trajectory(IteratedMap(atoms.calc.potential, self.stepper), rows, self.kept)
        self._start, self._cell = start, cell
        self._started, self._started_with = atoms.copy(), self.stepper.todict()

    def moved(self, x: np.ndarray) -> None:
        """Take note of where a frame has moved the atoms."""
        self._expected = x

    def relaxation(self, target: Any, adjoint: Adjoint, fmax: float) -> Relaxation:
        """The Relaxation of the frames that were kept.

        Raises
        ------
        RuntimeError
            Where there is none, or where atoms or weights are not those that the last frame left.
        ValueError, NotImplementedError
            For constraints and filters that cannot be differentiated, by name.
        """
        _check_frames(target)
        trajectory = self.trajectory
        if trajectory is None:
            raise RuntimeError("This run recorded no step: run it with record=True and at least one step.")
        trajectory.check_weights()
        if not self._continues(trajectory, target):
            raise RuntimeError(
                "The atoms were changed after the last step of this run: take its relaxation before that."
            )
        assert self._start is not None
        # Attached again each time: a graph can be gone through once.
        rows = self._start if self._cell is None else self._cell.strained(self._start)
        if torch.is_grad_enabled():
            adjoint.check(trajectory.map, rows)
        # A trajectory of its own: the run may continue.
        frames = list(trajectory.frames)
        own = replace(trajectory, start=rows, frames=frames, nsteps=[len(frames)], ends={})
        return _as_left(own, self._start, target, self._cell, adjoint, fmax)

    def _continues(self, trajectory: Trajectory, target: Any) -> bool:
        """Whether this target, constraints, weights and hyperparameters are what the last frame that was kept left."""
        atoms = atoms_of(target)
        if atoms is None or not isinstance(atoms.calc, TorchCalculator):
            return False
        as_left = self._expected is not None and np.array_equal(self._expected, target.get_positions().ravel())
        same = atoms.calc.potential is trajectory.map.potential and trajectory.map.fingerprint() == trajectory.weights
        return (
            as_left
            and same
            and CellRows.of(target) == self._cell
            and _same_atoms(self._started, atoms, {"positions"} if self._cell is None else {"positions", "cell"})
            and self.stepper.todict() == self._started_with
        )


def _check_frames(target: Any) -> tuple[Atoms, CellRows | None, Structures]:
    """The Atoms of a target, how a filter holds them, and the leaves at which gradients arrive; raises by name."""
    atoms = check_differentiable(target)
    cell, start = CellRows.of(target), atoms.calc.potential.batch(atoms)
    if cell is not None:
        cell.check_factor(len(atoms))
        cell.strained(start)
    return atoms, cell, _leaf(start, cell)


def _same_atoms(a: Atoms, b: Atoms, moving: set[str]) -> bool:
    """Whether two structures differ in nothing that a frame depends on but in what moves."""
    if not same_but_positions(a, b):
        # ASE does not compare masses, by which constraints of the centre of mass weigh.
        differ = compare_atoms(a, b, excluded_properties=moving)
        if differ or specified(a) != specified(b) or not np.array_equal(a.get_masses(), b.get_masses()):
            return False
    return _equal([*map(vars, a.constraints)], [*map(vars, b.constraints)]) and (
        [*map(type, a.constraints)] == [*map(type, b.constraints)]
    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests of lists and dictionaries hold the same numbers and words; nothing else is looked into."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, np.ndarray | np.generic | int | float | str):
        return type(a) is type(b) and np.array_equal(a, b)
    return True


def as_relaxation(
    atoms: Atoms | FrechetCellFilter,
    *,
    initial: Atoms | None = None,
    adjoint: Adjoint | str = "implicit",
    nsteps: int = 0,
) -> Relaxation:
    """The differentiable Relaxation of Atoms that anything has relaxed: any optimizer of ASE's, or a file.

    Parameters
    ----------
    atoms : Atoms or FrechetCellFilter
        Relaxed, with a TorchCalculator; in a filter where the cell was relaxed, too.
    initial : Atoms, optional
        Where the relaxation started, for the result; the gradient at its positions is zero.
    adjoint : Implicit or OneStep
        Those that need no frames.
    nsteps : int
        Frames that the relaxation took, where known.

    Raises
    ------
    ValueError
        Where a force is larger than the adjoint's fmax, or the initial structure holds other atoms, or another cell
        where that is fixed; for what a filter cannot be differentiated with.
    TypeError
        For an adjoint that needs frames.
    RuntimeError, NotImplementedError
        Without a TorchCalculator; for filters and constraints that cannot be differentiated, by name.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase.optimize import BFGS
    >>> from ase_bptt import TorchCalculator, as_relaxation, load_potential
    >>> atoms = molecule("N2")
    >>> atoms.calc = TorchCalculator(load_potential("lj"))
    >>> atoms.set_distance(0, 1, 1.2)
    >>> bool(BFGS(atoms, logfile=None).run(fmax=1e-3))
    True
    >>> as_relaxation(atoms)
    Relaxation: N2, converged after 0 frames, energy -0.9945 eV, fmax 0.0003 eV/Å
    """
    target, atoms = atoms, check_differentiable(atoms)
    cell = CellRows.of(target)
    passing = PASSING if cell is None else PASSING | {"cell"}
    if initial is not None and compare_atoms(initial, atoms, excluded_properties=passing):
        raise ValueError(
            f"The initial structure ({initial.symbols}) and the relaxed one ({atoms.symbols}) do not hold the same "
            "atoms in the same order and cell: give the start of a relaxation at fixed cell, or leave it out."
        )
    chosen = make_adjoint(adjoint)
    if chosen is None or chosen.through_frames:
        raise TypeError("Only 'implicit' and 'one-step' need no frames: relax with ase_bptt.relax for the others.")
    potential = atoms.calc.potential
    largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
    fmax = chosen.required_fmax(math.inf)
    if not largest < fmax:
        raise ValueError(
            f"The largest force on these atoms is {largest:.3g} eV/Å, and the adjoint {chosen.name!r} holds at a "
            f"minimum: relax below its fmax of {fmax:g} eV/Å."
        )
    start = potential.batch(atoms)
    if initial is not None:
        start = start.replace(positions=torch.tensor(initial.positions).to(start.positions))
    if initial is not None and cell is not None:
        start = start.replace(cells=torch.tensor(initial.cell.array[None]).to(start.cells))
    start = rows = _leaf(start, cell)
    if cell is not None:
        # A minimum is the same wherever its deformation is measured from, and its gradient goes to this cell.
        cell = cell.starting(initial or atoms)
        rows = cell.strained(start)
    trajectory = Trajectory(IteratedMap(potential, GradientDescent()), rows, nsteps=[nsteps])
    chosen.check(trajectory.map, rows)
    return _as_left(trajectory, start, target, cell, chosen, fmax)


def _as_left(
    trajectory: Trajectory, start: Structures, target: Any, cell: CellRows | None, adjoint: Adjoint, fmax: float
) -> Relaxation:
    """The Relaxation from the start to where the target is."""
    atoms = check_differentiable(target)
    there = atoms.calc.potential.batch(atoms)
    with torch.no_grad():
        positions = there.positions if cell is None else cell.strained(there).positions
    forces, acting = target.get_forces(apply_constraint=False), target.get_forces()
    broken, converged = not np.isfinite(forces).all(), np.linalg.norm(acting, axis=1).max() < fmax
    end = End(
        positions=positions,
        energy=torch.tensor(target.get_potential_energy()).to(positions),
        forces=torch.tensor(forces).to(positions),
        status=Status.DIVERGED if broken else Status.CONVERGED if converged else Status.OUT_OF_STEPS,
        nsteps=trajectory.nsteps[0],
    )
    trajectory.end({0: end})
    attached = Attached(trajectory, adjoint.attach(trajectory))
    return Relaxation.of(attached, start=start, sources=(atoms,), single=True)


def _leaf(start: Structures, cell: CellRows | None) -> Structures:
    """The same start, at whose positions gradients arrive, and at whose cell where it moves."""
    positions = start.positions.detach().requires_grad_()
    if cell is None:
        return start.replace(positions=positions)
    return start.replace(positions=positions, cells=start.cells.detach().requires_grad_())
