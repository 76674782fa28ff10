"""The ASE Optimizer face of the steppers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.io.jsonio import decode
from ase.optimize.optimize import Optimizer, RestartError
from torch import Tensor

from .adjoints import Adjoint, FullTape, Replay, make_adjoint
from .calculator import TorchCalculator
from .frames import IteratedMap, Record
from .result import Relaxation, Status
from .steppers import STEPPERS, State, Stepper, make_stepper
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
        Å; None is the stepper's 0.2. FIRE caps the norm of the whole step (as ASE's does), gradient
        descent the longest step of an atom.
    stepper : str or Stepper
        "fire" or "gd", or an object.
    adjoint : Adjoint or str
        For `relaxation`; `Replay` by default.
    record : bool
        Keep the stepper's states on the host (48 bytes an atom and step), for `relaxation`.
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
        self.maxstep = getattr(self.stepper, "maxstep", None)
        self.adjoint = make_adjoint(adjoint) or Replay()
        if isinstance(self.adjoint, FullTape):
            raise TypeError("An ASE run leaves no tape behind: take adjoint='replay', or ase_bptt.relax.")
        self.record = record
        self._state: State | None = None
        self._record: Record | None = None
        self._begun = Atoms()
        self._expected: np.ndarray | None = None
        super().__init__(atoms, restart, logfile, trajectory, append_trajectory, **kwargs)

    def initialize(self) -> None:
        """Begin without velocities."""
        self._state = None

    def read(self) -> None:
        """Take the stepper's whole state from the restart file."""
        like = self.stepper.init(_rows(self.optimizable.get_x()), 1)
        try:
            saved = decode(Path(str(self.restart)).read_text(), always_array=False)
            if saved["stepper"] != self.stepper.name:
                raise ValueError(f"it belongs to the stepper {saved['stepper']!r}, not {self.stepper.name!r}")
            self._state = _state_from_json(saved, like)
            if saved["orig_cell"] is not None:
                filtered: Any = self.atoms
                filtered.orig_cell = np.array(saved["orig_cell"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RestartError(
                f"Could not decode the restart file {self.restart} ({type(error).__name__}: {error}): "
                "delete it to start afresh."
            ) from error

    def step(self, forces: Any = None) -> None:
        """One frame through the Optimizable."""
        optimizable = self.optimizable
        x = optimizable.get_x()
        gradient = optimizable.get_gradient()
        if not np.isfinite(gradient).all():
            self._stop()
            return
        positions, force = _rows(x), -_rows(gradient)
        if self._state is None:
            self._state = self.stepper.init(positions, 1)
        batch = torch.zeros(len(positions), dtype=torch.int64)
        if self.record:
            self._keep(positions)
        with torch.no_grad():
            moved, self._state = self.stepper.step(positions, force, self._state, batch)
        if not bool(torch.isfinite(moved).all()):
            self._stop()
            return
        self._expected = moved.reshape(-1).numpy()
        optimizable.set_x(self._expected.copy())
        # A cell filter measures its strain from here; without it a restart takes another path.
        orig_cell = getattr(self.atoms, "orig_cell", None)
        self.dump(
            {
                "stepper": self.stepper.name,
                "atoms": {k: v.tolist() for k, v in self._state.atoms.items()},
                "structures": {k: v.tolist() for k, v in self._state.structures.items()},
                "orig_cell": None if orig_cell is None else np.asarray(orig_cell).tolist(),
            }
        )

    def _stop(self) -> None:
        """End the run after this step, and say why."""
        log.warning("The run stops at step %d. %s", self.nsteps, Status.DIVERGED.sentence)
        self.max_steps = self.nsteps

    def todict(self) -> dict[str, Any]:
        """ASE's description of the run, with the stepper's name and numbers."""
        return super().todict() | {"stepper": self.stepper.todict()}

    @property
    def relaxation(self) -> Relaxation:
        """The differentiable Relaxation of the run so far.

        Raises
        ------
        RuntimeError
            Without record=True, before any step, or for anything but Atoms with a TorchCalculator.
        NotImplementedError
            For constrained Atoms, by name.
        """
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
            self._begun = atoms.copy()
        assert self._state is not None
        self._record.keep(positions, self._state)

    def _continues(self, record: Record, atoms: Atoms) -> bool:
        """Whether these atoms and weights are what the last recorded step left."""
        changed = compare_atoms(self._begun, atoms, excluded_properties={"positions"})
        as_left = self._expected is not None and np.array_equal(self._expected, self.optimizable.get_x())
        same = atoms.calc.potential is record.map.potential and record.map.fingerprint() == record.weights
        return as_left and same and not changed


def _fields_of(stepper: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the stepper's own numbers out of the keywords."""
    if stepper not in STEPPERS:
        make_stepper(stepper)
    return {name: kwargs.pop(name) for name in STEPPERS[stepper].fields if name in kwargs}


def _rows(flat: np.ndarray) -> Tensor:
    """Atoms as rows of three; any other number of variables is one row."""
    columns = 3 if flat.size % 3 == 0 else flat.size
    return torch.from_numpy(np.array(flat, dtype=float)).reshape(-1, columns)


def _state_from_json(saved: dict[str, Any], like: State) -> State:
    """The saved state, in the dtypes and shapes of a state of this run."""

    def tensors(saved: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: torch.tensor(saved[name], dtype=value.dtype) for name, value in like.items()}
        for name, value in like.items():
            if found[name].shape != value.shape:
                raise ValueError(f"its {name} are those of {len(found[name])} rows, not {len(value)}")
        return found

    return State(tensors(saved["atoms"], like.atoms), tensors(saved["structures"], like.structures))
