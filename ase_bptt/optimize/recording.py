"""What an ASE run leaves behind: the states that its gradient is taken from, and its restart file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.io.jsonio import decode, encode
from ase.optimize.optimize import Optimizer, RestartError
from torch import Tensor

from ..adjoints import Adjoint, Attached, make_adjoint
from ..calculator import TorchCalculator, same_but_positions
from ..constraints import KNOWN, unknown_of
from ..iterated_map import Checkpointing, End, IteratedMap, Status, Trajectory
from ..result import Relaxation
from ..steppers import GradientDescent, State, Stepper
from ..structures import Structures
from ..utils import replacing

PASSING = {"positions", "initial_charges", "initial_magmoms"}
"""What start and end of a relaxation may differ in."""


class Recording:
    """The states before each frame of a run on Atoms with a TorchCalculator.

    Parameters
    ----------
    stepper : Stepper
    kept : Checkpointing
        Which frames' states are stored.
    """

    def __init__(self, stepper: Stepper, kept: Checkpointing):
        self.stepper, self.kept = stepper, kept
        self.trajectory: Trajectory | None = None
        self._started = Atoms()
        self._started_with: dict[str, Any] = {}
        self._expected: np.ndarray | None = None

    def keep(self, atoms: Any, positions: Tensor, state: State) -> None:
        """Keep the state before a frame; start another trajectory where something else changed the atoms."""
        if not isinstance(atoms, Atoms) or not isinstance(atoms.calc, TorchCalculator) or unknown_of(atoms):
            return
        if self.trajectory is None or not self._continues(self.trajectory, atoms):
            potential = atoms.calc.potential
            start = _leaf(potential.batch(atoms))
            self.trajectory = Trajectory(IteratedMap(potential, self.stepper), start, self.kept)
            self._started, self._started_with = atoms.copy(), self.stepper.todict()
        self.trajectory.keep(positions, state)

    def moved(self, x: np.ndarray) -> None:
        """Take note of where a frame has moved the atoms."""
        self._expected = x

    def relaxation(self, atoms: Any, adjoint: Adjoint, fmax: float) -> Relaxation:
        """The Relaxation of the frames that were kept.

        Raises
        ------
        RuntimeError
            Where there is none, or where atoms or weights are not those that the last frame left.
        NotImplementedError
            For constraints that `relax` does not know, by name.
        """
        _check_differentiable(atoms)
        trajectory = self.trajectory
        if trajectory is None:
            raise RuntimeError("This run recorded no step: run it with record=True and at least one step.")
        trajectory.check_weights()
        if not self._continues(trajectory, atoms):
            raise RuntimeError(
                "The atoms were changed after the last step of this run: take its relaxation before that."
            )
        if torch.is_grad_enabled():
            adjoint.check(trajectory.map, trajectory.start)
        # A trajectory of its own: the run may continue.
        frames = list(trajectory.frames)
        own = replace(trajectory, frames=frames, nsteps=[len(frames)], ends={})
        return _as_left(own, atoms, adjoint, fmax)

    def _continues(self, trajectory: Trajectory, atoms: Atoms) -> bool:
        """Whether these atoms, constraints, weights and hyperparameters are what the last frame that was kept left."""
        as_left = self._expected is not None and np.array_equal(self._expected, atoms.positions.ravel())
        same = atoms.calc.potential is trajectory.map.potential and trajectory.map.fingerprint() == trajectory.weights
        return as_left and same and _same_atoms(self._started, atoms) and self.stepper.todict() == self._started_with


def _same_atoms(a: Atoms, b: Atoms) -> bool:
    """Whether two structures differ in nothing but their positions that a frame depends on."""
    if not same_but_positions(a, b):
        # ASE does not compare masses, by which constraints of the centre of mass weigh.
        differ = compare_atoms(a, b, excluded_properties={"positions"})
        if differ or not np.array_equal(a.get_masses(), b.get_masses()):
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
    atoms: Atoms, *, initial: Atoms | None = None, adjoint: Adjoint | str = "implicit", nsteps: int = 0
) -> Relaxation:
    """The differentiable Relaxation of Atoms that anything has relaxed: any optimizer of ASE's, or a file.

    Parameters
    ----------
    atoms : Atoms
        Relaxed, with a TorchCalculator.
    initial : Atoms, optional
        Where the relaxation started, for the result; the gradient there is zero.
    adjoint : Implicit or OneStep
        Those that need no frames.
    nsteps : int
        Frames that the relaxation took, where known.

    Raises
    ------
    ValueError
        Where a force is larger than the adjoint's fmax, or the initial structure holds other atoms or another cell.
    TypeError
        For an adjoint that needs frames.
    RuntimeError, NotImplementedError
        Without a TorchCalculator; for constraints that cannot be differentiated, by name.

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
    _check_differentiable(atoms)
    if initial is not None and compare_atoms(initial, atoms, excluded_properties=PASSING):
        raise ValueError(
            f"The initial structure ({initial.symbols}) and the relaxed one ({atoms.symbols}) do not hold the same "
            "atoms in the same order and cell: give the start of a relaxation at fixed cell, or leave it out."
        )
    chosen = make_adjoint(adjoint)
    if chosen is None or chosen.through_frames:
        raise TypeError("Only 'implicit' and 'one-step' need no frames: relax with ase_bptt.relax for the others.")
    potential = atoms.calc.potential
    largest = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
    fmax = chosen.required_fmax(math.inf)
    if not largest < fmax:
        raise ValueError(
            f"The largest force on these atoms is {largest:.3g} eV/Å, and the adjoint {chosen.name!r} holds at a "
            f"minimum: relax below its fmax of {fmax:g} eV/Å."
        )
    start = potential.batch(atoms)
    if initial is not None:
        start = start.replace(positions=torch.tensor(initial.positions).to(start.positions))
    trajectory = Trajectory(IteratedMap(potential, GradientDescent()), _leaf(start), nsteps=[nsteps])
    chosen.check(trajectory.map, start)
    return _as_left(trajectory, atoms, chosen, fmax)


def _as_left(trajectory: Trajectory, atoms: Atoms, adjoint: Adjoint, fmax: float) -> Relaxation:
    """The Relaxation that ends where the atoms are."""
    like = trajectory.start.positions
    forces, acting = atoms.get_forces(apply_constraint=False), atoms.get_forces()
    broken, converged = not np.isfinite(forces).all(), np.linalg.norm(acting, axis=1).max() < fmax
    end = End(
        positions=torch.tensor(atoms.positions).to(like),
        energy=torch.tensor(atoms.calc.get_property("energy", atoms)).to(like),
        forces=torch.tensor(forces).to(like),
        status=Status.DIVERGED if broken else Status.CONVERGED if converged else Status.OUT_OF_STEPS,
        nsteps=trajectory.nsteps[0],
    )
    trajectory.end({0: end})
    return Relaxation.of(Attached(trajectory, adjoint.attach(trajectory)), (atoms,), single=True)


def _leaf(start: Structures) -> Structures:
    """The same start, at whose positions gradients arrive."""
    return start.replace(positions=start.positions.detach().requires_grad_())


def _check_differentiable(atoms: Any) -> None:
    if not isinstance(atoms, Atoms) or not isinstance(atoms.calc, TorchCalculator):
        raise RuntimeError(
            "Only a run on Atoms with a TorchCalculator can be differentiated; this one moves a "
            f"{type(atoms).__name__} with {type(getattr(atoms, 'calc', None)).__name__}."
        )
    names = unknown_of(atoms)
    if names:
        raise NotImplementedError(
            f"The constraints {', '.join(names)} cannot be differentiated; {', '.join(KNOWN)} can."
        )


BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What a restart file raises that is cut, edited or another run's."""


def write_restart(optimizer: Optimizer, data: Any) -> None:
    """Write the restart file, where the run has one, on the first rank."""
    if optimizer.restart is not None and optimizer.comm.rank == 0:
        with replacing(optimizer.restart) as temporary:
            temporary.write_text(encode(data))


def read_restart(optimizer: Optimizer) -> Any:
    """What the restart file holds; ValueError where it is not JSON."""
    # ASE's own reader warns of every class but BFGS on a cell filter.
    return decode(Path(str(optimizer.restart)).read_text(), always_array=False)


REFERENCES = ("orig_cell", "origcell", "strain")
"""What ASE's cell filters measure their strain from, or keep of it; without it a restart takes another path."""


def filter_to_json(target: Any) -> dict[str, Any]:
    """What a filter holds beside its atoms, as nested lists; nothing of Atoms and bands."""
    return {name: np.asarray(getattr(target, name)).tolist() for name in REFERENCES if hasattr(target, name)}


def filter_from_json(saved: dict[str, Any], target: Any) -> None:
    """Give a filter what another one held; ValueError where it holds other things."""
    if saved.keys() != filter_to_json(target).keys():
        raise ValueError(f"it belongs to a run on another kind of filter than {type(target).__name__}")
    for name, value in saved.items():
        setattr(target, name, np.array(value, dtype=float).reshape(np.shape(getattr(target, name))))


def unreadable(optimizer: Optimizer, error: Exception) -> RestartError:
    """The error that says what is wrong with a restart file."""
    return RestartError(
        f"Could not decode the restart file {optimizer.restart} ({type(error).__name__}: {error}): "
        "delete it to start afresh."
    )


def state_to_json(state: State) -> dict[str, Any]:
    """A stepper's state as nested lists."""
    return {
        "atoms": {k: v.tolist() for k, v in state.atoms.items()},
        "structures": {k: v.tolist() for k, v in state.structures.items()},
        "lists": {k: [t.tolist() for t in v] for k, v in state.lists.items()},
    }


def state_from_json(saved: dict[str, Any], like: State) -> State:
    """The saved state, in the dtypes and shapes of the first state of this run; axes of length 0 grow in a run.

    Raises
    ------
    ValueError, KeyError, TypeError
        Where it is no state, or of other shapes.
    """

    def tensor(name: str, values: Any, like: Tensor) -> Tensor:
        found = torch.tensor(values, dtype=like.dtype)
        if found.ndim != like.ndim or any(0 != b != a for a, b in zip(found.shape, like.shape)):
            raise ValueError(f"its {name} are those of {len(found)} rows, not {len(like)}")
        return found

    def tensors(saved: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor(name, saved[name], value) for name, value in like.items()}

    def listed(name: str, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor(name, values, value) for values, value in zip(saved["lists"][name], like, strict=True))

    return State(
        tensors(saved["atoms"], like.atoms),
        tensors(saved["structures"], like.structures),
        {name: listed(name, value) for name, value in like.lists.items()},
    )
