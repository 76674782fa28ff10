"""The ASE Optimizer face of the steppers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.optimize.optimize import Optimizer
from ase.utils.abc import Optimizable
from torch import Tensor

from .adjoints import Adjoint, FullTape, Replay, make_adjoint
from .calculator import TorchCalculator
from .frames import IteratedMap, Record
from .restart import BROKEN, read_restart, state_from_json, state_to_json, unreadable, write_restart
from .result import Relaxation, Status
from .steppers import STEPPERS, Learner, State, Stepper, make_stepper
from .structures import Structures

log = logging.getLogger(__name__)


class BPTTOptimizer(Optimizer):
    """An ASE Optimizer whose run can be differentiated afterwards.

    Parameters
    ----------
    atoms : Atoms, Filter, NEB or any Optimizable
    restart, logfile, trajectory, append_trajectory
        As in ASE's own optimizers.
    maxstep : float or None
        Å; None is the stepper's 0.2. FIRE caps the norm of the whole step (as ASE's does), the others
        the longest step of an atom.
    stepper : str or Stepper
        "fire", "gd", "bfgs" or "lbfgs", or an object.
    adjoint : Adjoint or str
        For `relaxation`; `Replay` by default.
    record : bool
        Keep the stepper's states on the host (48 bytes an atom and step), for `relaxation`. Nothing is
        kept of steppers that cannot be differentiated (BFGS, LBFGS).
    **kwargs
        Fields of the stepper go to it (dt=..., step_size=...), the rest to ASE's Optimizer, which
        raises TypeError for what it does not know.
    """

    def __init__(
        self,
        atoms: Any,
        restart: str | Path | None = None,
        logfile: IO | str | Path | None = "-",
        trajectory: Any = None,
        append_trajectory: bool = False,
        maxstep: float | None = None,
        *,
        stepper: str | Stepper = "fire",
        adjoint: Adjoint | str | None = None,
        record: bool = True,
        **kwargs: Any,
    ):
        numbers = {} if isinstance(stepper, Stepper) else _fields_of(stepper, kwargs)
        if maxstep is not None:
            numbers["maxstep"] = maxstep
        self.stepper = make_stepper(stepper, **numbers)
        self.adjoint = make_adjoint(adjoint) or Replay()
        if isinstance(self.adjoint, FullTape):
            raise TypeError("An ASE run leaves no tape behind: take adjoint='replay', or ase_bptt.relax.")
        self.record = record and self.stepper.differentiable
        self._state: State | None = None
        self._record: Record | None = None
        self._begun = Atoms()
        self._begun_with: dict[str, Any] = {}
        self._expected: np.ndarray | None = None
        super().__init__(atoms, restart, logfile, trajectory, append_trajectory, **kwargs)

    @property
    def maxstep(self) -> float:
        """The stepper's, in Å."""
        return self.stepper.maxstep  # type: ignore[return-value]

    @maxstep.setter
    def maxstep(self, maxstep: float) -> None:
        self.stepper.maxstep = maxstep  # type: ignore[assignment]

    def initialize(self) -> None:
        """Begin without velocities."""
        self._state = None

    def read(self) -> None:
        """Take the stepper's whole state from the restart file."""
        try:
            self._take(read_restart(self))
        except BROKEN as error:
            raise unreadable(self, error) from error

    def dump(self, data: Any) -> None:
        """Write the restart file, where there is one."""
        write_restart(self, data)

    def step(self, forces: Any = None) -> None:
        """One frame through the Optimizable."""
        gradient = self._get_gradient(forces)
        if not np.isfinite(gradient).all():
            stop(self)
            return
        if self._state is None:
            self._state = self._first_state()
        self._before_frame()
        positions, force = self._rows(self.optimizable.get_x()), -self._rows(gradient)
        if self.record:
            self._keep(positions)
        with torch.no_grad():
            moved, self._state = self.stepper.step(positions, force, self._state, _one(positions))
        if not bool(torch.isfinite(moved).all()):
            stop(self)
            return
        self._expected = moved.reshape(-1).numpy()
        self.optimizable.set_x(self._expected.copy())
        self.dump(self._saved())

    def _before_frame(self) -> None:
        """What a rule does before a frame that needs energies, too."""

    def _first_state(self) -> State:
        return self.stepper.init(self._rows(self.optimizable.get_x()), 1)

    def _rows(self, flat: np.ndarray) -> Tensor:
        """Atoms as rows of three; variables with a norm of their own, or not three an atom, are one row."""
        norm = getattr(type(self.optimizable), "gradient_norm", None)
        columns = 3 if flat.size % 3 == 0 and norm is Optimizable.gradient_norm else flat.size
        return torch.from_numpy(np.array(flat, dtype=float)).reshape(-1, columns)

    def _saved(self) -> dict[str, Any]:
        """All that the next step depends on, besides the atoms, as JSON."""
        assert self._state is not None
        # A cell filter measures its strain from here; without it a restart takes another path.
        orig_cell = getattr(self.atoms, "orig_cell", None)
        return {
            "stepper": self.stepper.name,
            **state_to_json(self._state),
            "orig_cell": None if orig_cell is None else np.asarray(orig_cell).tolist(),
        }

    def _take(self, saved: dict[str, Any]) -> None:
        """Go on from what `_saved` gave."""
        if saved["stepper"] != self.stepper.name:
            raise ValueError(f"it belongs to the stepper {saved['stepper']!r}, not {self.stepper.name!r}")
        self._state = state_from_json(saved, self._first_state())
        if saved["orig_cell"] is not None:
            filtered: Any = self.atoms
            filtered.orig_cell = np.array(saved["orig_cell"])

    def _replay_trajectory(self, traj: Any) -> None:
        """Learn curvatures from a trajectory, as ASE's rule of this name does."""
        stepper = self.stepper
        if not isinstance(stepper, Learner):
            raise TypeError(f"The stepper {stepper.name!r} learns nothing from a trajectory; 'bfgs' and 'lbfgs' do.")
        self._state = self._first_state()
        for k in range(len(traj) if stepper.learns_the_end else len(traj) - 1):
            positions, forces = (self._rows(x.ravel()) for x in (traj[k].get_positions(), traj[k].get_forces()))
            self._state = stepper.learn(positions, forces, self._state, _one(positions))

    def todict(self) -> dict[str, Any]:
        """ASE's description of the run, with the stepper's name and numbers."""
        return super().todict() | {"stepper": self.stepper.todict()}

    @property
    def relaxation(self) -> Relaxation:
        """The differentiable Relaxation of the run so far.

        Raises
        ------
        RuntimeError
            Without record=True, before any step, for anything but Atoms with a TorchCalculator, or for a
            stepper that cannot be differentiated.
        NotImplementedError
            For constrained Atoms, by name.
        """
        if not self.stepper.differentiable:
            raise RuntimeError(not_differentiable(type(self).__name__, self.stepper.name))
        atoms, record = self.optimizable_atoms(), self._record
        if record is None:
            raise RuntimeError("This run recorded no step: run it with record=True and at least one step.")
        record.check_weights()
        if not self._continues(record, atoms):
            raise RuntimeError(
                "The atoms were changed after the last step of this run: take its relaxation before that."
            )
        record.nsteps = [len(record.frames)]
        structures = record.start
        record.final = torch.tensor(atoms.positions).to(structures.positions)
        inputs = record.map.parameters()
        final = self.adjoint.attach(record, record.final) if inputs else record.final
        forces = torch.tensor(atoms.get_forces()).to(structures.positions)
        if not bool(torch.isfinite(forces).all()):
            status = Status.DIVERGED
        elif self.optimizable.converged(self.optimizable.get_gradient(), self.fmax):
            status = Status.CONVERGED
        else:
            status = Status.OUT_OF_STEPS
        return Relaxation(
            start=structures,
            positions=final,
            forces=forces,
            nsteps=torch.tensor(record.nsteps),
            status=(status,),
            _energies=torch.tensor([atoms.get_potential_energy()]).to(structures.positions),
            _record=record,
            _sources=(atoms,),
            _single=True,
        )

    def optimizable_atoms(self) -> Atoms:
        """The Atoms of this run, if its steps can be differentiated; an error that says why not."""
        atoms = self.atoms
        if not isinstance(atoms, Atoms) or not isinstance(atoms.calc, TorchCalculator):
            raise RuntimeError(
                "Only a run on Atoms with a TorchCalculator can be differentiated; this one moves a "
                f"{type(atoms).__name__} with {type(getattr(atoms, 'calc', None)).__name__}."
            )
        if atoms.constraints:
            names = ", ".join(Structures.from_atoms(atoms).constraint_names)
            raise NotImplementedError(f"The constraints {names} cannot be differentiated yet.")
        return atoms

    def _keep(self, positions: Tensor) -> None:
        """Store the state before this frame; start anew where somebody else changed the atoms."""
        atoms = self.atoms
        if not isinstance(atoms, Atoms) or not isinstance(atoms.calc, TorchCalculator) or atoms.constraints:
            return
        if self._record is None or not self._continues(self._record, atoms):
            potential = atoms.calc.potential
            start = Structures.from_atoms(atoms, device=potential.device, dtype=potential.dtype)
            self._record = Record(IteratedMap(potential, self.stepper), start)
            self._begun, self._begun_with = atoms.copy(), self.stepper.todict()
        assert self._state is not None
        self._record.keep(positions, self._state)

    def _continues(self, record: Record, atoms: Atoms) -> bool:
        """Whether these atoms, weights and numbers are what the last recorded step left."""
        changed = compare_atoms(self._begun, atoms, excluded_properties={"positions"})
        as_left = self._expected is not None and np.array_equal(self._expected, self.optimizable.get_x())
        same = atoms.calc.potential is record.map.potential and record.map.fingerprint() == record.weights
        return as_left and same and not changed and self.stepper.todict() == self._begun_with


def _fields_of(stepper: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the stepper's own numbers out of the keywords."""
    if stepper not in STEPPERS:
        make_stepper(stepper)
    return {name: kwargs.pop(name) for name in STEPPERS[stepper].fields if name in kwargs}


def stop(optimizer: Optimizer) -> None:
    """End an ASE run after this step, and say why."""
    log.warning("The run stops at step %d. %s", optimizer.nsteps, Status.DIVERGED.sentence)
    optimizer.max_steps = optimizer.nsteps


def not_differentiable(name: str, stepper: str) -> str:
    """Why a run has no relaxation."""
    return (
        f"A run of {name} leaves no relaxation, for {stepper!r} cannot be differentiated: relax with FIRE or "
        "gradient descent where a gradient is wanted."
    )


def _one(rows: Tensor) -> Tensor:
    """Every row in structure 0."""
    return torch.zeros(len(rows), dtype=torch.int64)
