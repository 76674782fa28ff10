"""The ASE Optimizer face of the steppers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.io import Trajectory
from ase.optimize.optimize import Optimizer
from ase.utils.abc import Optimizable
from torch import Tensor

from ..adjoints import Adjoint, Replay, make_adjoint
from ..calculator import TorchCalculator
from ..iterated_map import Checkpointing, Status
from ..result import Relaxation
from ..stability import resolve_step_size
from ..steppers import STEPPERS, Learner, State, Stepper, belongs_to, make_stepper
from ..suggestions import keywords, named, unknown_keyword
from ..utils import outside_inference_mode
from .cell_filters import atoms_of, check_differentiable
from .recording import PASSING, Recording, as_relaxation
from .restart import BROKEN, filter_from_json, filter_to_json, read_restart

from .restart import state_from_json, state_to_json, unreadable, write_restart  # isort: skip

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
        "fire", "gd", "bfgs" or "lbfgs", in any case, or an object.
    adjoint : Adjoint or str
        For `relaxation`; `Replay` by default.
    record : bool
        Keep the stepper's states on the host (48 bytes an atom and step), for `relaxation`. Nothing is
        kept of steppers that cannot be differentiated (BFGS, LBFGS).
    **kwargs
        Hyperparameters of the stepper go to it (dt=..., step_size=...), the rest to ASE's Optimizer.

    Raises
    ------
    TypeError
        For keywords that neither the stepper nor ASE's Optimizer has, with the nearest, or the stepper that has it.
    ValueError
        For unknown names of steppers and adjoints, with the nearest.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import BPTTOptimizer, TorchCalculator
    >>> atoms = molecule("N2")
    >>> atoms.calc = TorchCalculator("emt")
    >>> optimizer = BPTTOptimizer(atoms, logfile=None)
    >>> bool(optimizer.run(fmax=0.01))
    True
    >>> bond = optimizer.relaxation.positions.diff(dim=0).norm()
    >>> bond.backward()  # into the weights of the potential, where it has any
    >>> print(f"{bond:.3f} Å")
    0.998 Å
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
        numbers = self._hyperparameters(stepper, kwargs)
        if maxstep is not None:
            numbers["maxstep"] = maxstep
        self.stepper = make_stepper(stepper, **numbers)
        self.adjoint = make_adjoint(adjoint) or Replay()
        self.adjoint.check_recorded()
        if self.stepper.todict().get("step_size") == "auto" and not isinstance(atoms, Atoms):
            raise ValueError("step_size='auto' asks the potential of Atoms: give a number for a filter or a band.")
        self.record = record and self.stepper.differentiable and self.adjoint.checkpointing is not None
        self._state: State | None = None
        self._started: Atoms | None = None
        self._recording = Recording(self.stepper, self.adjoint.checkpointing or Checkpointing())
        super().__init__(atoms, restart, logfile, trajectory, append_trajectory, **kwargs)

    def _hyperparameters(self, stepper: str | Stepper, given: dict[str, Any]) -> dict[str, Any]:
        """Take those of the stepper out of the keywords; TypeError for keywords that nobody knows."""
        rule = stepper if isinstance(stepper, Stepper) else named(STEPPERS, stepper, "stepper")
        found = {name: given.pop(name) for name in rule.fields if name in given}
        refuse_unknown(type(self), given, rule.fields)
        return found

    @property
    def maxstep(self) -> float:
        """The stepper's, in Å."""
        return self.stepper.maxstep  # type: ignore[return-value]

    @maxstep.setter
    def maxstep(self, maxstep: float) -> None:
        self.stepper.maxstep = maxstep  # type: ignore[assignment]

    def initialize(self) -> None:
        """Start without velocities."""
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

    @outside_inference_mode
    def step(self, forces: Any = None) -> None:
        """One frame through the Optimizable."""
        gradient = self._get_gradient(forces)
        if not np.isfinite(gradient).all():
            stop(self)
            return
        if self._state is None:
            self._settle()
            self._state = self._first_state()
        if self._started is None and not self.adjoint.through_frames and (atoms := atoms_of(self.atoms)) is not None:
            self._started = atoms.copy()
        self._before_frame()
        positions, force = self._rows(self.optimizable.get_x()), -self._rows(gradient)
        if self.record:
            self._recording.keep(self.atoms, positions, self._state)
        with torch.no_grad():
            moved, self._state = self.stepper.step(positions, force, self._state, _one(positions))
        if not bool(torch.isfinite(moved).all()):
            stop(self)
            return
        self.optimizable.set_x(moved.reshape(-1).numpy().copy())
        # Constraints may have moved the atoms elsewhere than they were asked to.
        self._recording.moved(self.optimizable.get_x())
        if self.restart is not None:
            # The state as lists costs more than a step of a few hundred atoms.
            self.dump(self._saved())

    def _settle(self) -> None:
        """Find the step of step_size="auto", where there is a potential to ask."""
        calculator = getattr(self.atoms, "calc", None)
        if isinstance(self.atoms, Atoms) and isinstance(calculator, TorchCalculator):
            self.stepper = self._recording.stepper = resolve_step_size(self.stepper, calculator.potential, [self.atoms])

    def _before_frame(self) -> None:
        """What a rule does before a frame that needs energies, too."""

    def _first_state(self) -> State:
        rows = self._rows(self.optimizable.get_x())
        atoms = isinstance(self.atoms, Atoms) and len(rows) == len(self.atoms)
        return self.stepper.start(rows, 1, torch.tensor(self.atoms.numbers, dtype=torch.int64) if atoms else None)

    def _rows(self, flat: np.ndarray) -> Tensor:
        """Atoms as rows of three; variables with a norm of their own, or not three an atom, are one row."""
        norm = getattr(type(self.optimizable), "gradient_norm", None)
        columns = 3 if flat.size % 3 == 0 and norm is Optimizable.gradient_norm else flat.size
        return torch.from_numpy(np.array(flat, dtype=float)).reshape(-1, columns)

    def _saved(self) -> dict[str, Any]:
        """All that the next step depends on, besides the atoms, as JSON."""
        assert self._state is not None
        return {
            "stepper": self.stepper.name,
            "numbers": self.stepper.todict(),
            **state_to_json(self._state),
            "filter": filter_to_json(self.atoms),
        }

    def _take(self, saved: dict[str, Any]) -> None:
        """Continue from what `_saved` gave."""
        if saved["stepper"] != self.stepper.name:
            raise ValueError(f"it belongs to the stepper {saved['stepper']!r}, not {self.stepper.name!r}")
        if self.stepper.todict().get("step_size") == "auto":
            numbers = {name: value for name, value in saved["numbers"].items() if name != "name"}
            self.stepper = self._recording.stepper = make_stepper(self.stepper.name, **numbers)
        self._state = state_from_json(saved, self._first_state())
        filter_from_json(saved["filter"], self.atoms)

    def replay_trajectory(self, traj: Any) -> None:
        """Learn curvatures from a trajectory, as ASE's rule of this name does.

        Parameters
        ----------
        traj : str, Path, Trajectory or list of Atoms
            With forces.

        Raises
        ------
        TypeError
            For steppers that learn nothing.
        """
        if not isinstance(self.stepper, Learner):
            name = self.stepper.name
            raise TypeError(f"The stepper {name!r} learns nothing from a trajectory; 'bfgs' and 'lbfgs' do.")
        with Trajectory(traj) if isinstance(traj, str | Path) else nullcontext(traj) as images:
            self._learn(self.stepper, images)

    def _learn(self, stepper: Learner, images: Any) -> None:
        self._state = self._first_state()
        for k in range(len(images) if stepper.learns_the_end else len(images) - 1):
            positions, forces = (self._rows(x.ravel()) for x in (images[k].get_positions(), images[k].get_forces()))
            self._state = stepper.observe(positions, forces, self._state, _one(positions))

    def todict(self) -> dict[str, Any]:
        """ASE's description of the run, with the stepper's name and hyperparameters."""
        return super().todict() | {"stepper": self.stepper.todict()}

    @property
    def relaxation(self) -> Relaxation:
        """The differentiable Relaxation of the run so far.

        After ``backward`` the gradients are in the weights of the potential and, with respect to the start, in
        ``relaxation.start.positions.grad``, shape (n_atoms, 3), and after a run on ASE's FrechetCellFilter in
        ``relaxation.start.cells.grad``, shape (1, 3, 3), too. They add up over several calls. The run so far
        began with the first step, or with the first one after something else had changed atoms, weights or
        hyperparameters, or after a restart from a file, which keeps no frames: what the stepper carried over is then
        taken as given.

        Raises
        ------
        RuntimeError
            Without record=True, before any step, for anything but Atoms or their FrechetCellFilter with a
            TorchCalculator, or for a stepper that cannot be differentiated.
        ValueError, NotImplementedError
            For constraints that `relax` does not know, by name, and for masks whose strains are not closed.
        """
        if not self.adjoint.through_frames:
            initial, atoms = self._started, check_differentiable(self.atoms)
            passing = PASSING if atoms is self.atoms else PASSING | {"cell"}
            # Somebody may have changed the atoms between two runs.
            same = initial is not None and not compare_atoms(initial, atoms, excluded_properties=passing)
            return as_relaxation(
                self.atoms, initial=initial if same else None, adjoint=self.adjoint, nsteps=self.nsteps
            )
        if not self.stepper.differentiable:
            raise RuntimeError(not_differentiable(type(self).__name__, self.stepper.name))
        fmax: Any = self.fmax
        return self._recording.relaxation(self.atoms, self.adjoint, fmax)


def refuse_unknown(cls: type[Optimizer], given: Iterable[str], fields: Iterable[str] = ()) -> None:
    """TypeError for a keyword that neither an optimizer's class nor its stepper has."""
    known = keywords(cls)
    for name in given:
        if name not in known:
            advice = belongs_to() | dict.fromkeys(("fmax", "steps"), f"give it to run(), as run({name}=...)")
            raise unknown_keyword(cls.__name__, name, dict.fromkeys([*known, *fields]), advice)


def stop(optimizer: Optimizer) -> None:
    """End an ASE run after this step, and say why."""
    log.warning("The run stops at step %d. %s", optimizer.nsteps, Status.DIVERGED.sentence)
    optimizer.max_steps = optimizer.nsteps


def not_differentiable(name: str, stepper: str) -> str:
    """Why a run has no relaxation."""
    return (
        f"A run of {name} leaves no relaxation, for {stepper!r} cannot be differentiated: relax with FIRE or "
        "gradient descent where a gradient is wanted, or take adjoint='implicit', which needs the minimum alone."
    )


def _one(rows: Tensor) -> Tensor:
    """Every row in structure 0."""
    return torch.zeros(len(rows), dtype=torch.int64)
