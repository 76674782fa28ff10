"""ASE's optimizers by their own names and signatures: a script keeps its algorithm when its import is swapped.

``from ase_bptt.optimize import FIRE`` instead of ``from ase.optimize import FIRE``. The positions are ASE's; beyond
them, a restart takes the path of an uninterrupted run, forces that are not finite end a run with a sentence, and a run
of FIRE can be differentiated (`BPTTOptimizer.relaxation`).

>>> from ase_bptt.optimize import FIRE  # in place of: from ase.optimize import FIRE
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, Any, NamedTuple

import ase.optimize
import numpy as np
import torch

from ..result import Relaxation
from .bptt_optimizer import BPTTOptimizer, not_differentiable, refuse_unknown, stop
from .restart import BROKEN, filter_from_json, filter_to_json, read_restart, unreadable, write_restart

__all__ = ["BFGS", "FIRE", "LBFGS", "BFGSLineSearch", "QuasiNewton"]


class FIRE(BPTTOptimizer):
    """FIRE with the arguments of `ase.optimize.FIRE`, in their order.

    >>> from ase_bptt import TorchCalculator
    >>> atoms = ase.Atoms("N2", [(0, 0, 0), (0, 0, 1.1)], calculator=TorchCalculator("emt"))
    >>> bool(FIRE(atoms, logfile=None, dt=0.05).run(fmax=0.01))
    True

    Parameters
    ----------
    atoms, restart, logfile, trajectory
        As for `BPTTOptimizer`.
    dt, maxstep, dtmax, Nmin, finc, fdec, astart, fa, a
        As for `steppers.FIRE`.
    maxmove : float or None
        The old name of maxstep; ASE warns of it, too.
    downhill_check : bool
        After a step that raised the energy, return to where it started and continue from rest. Such a run has no
        `relaxation`.
    position_reset_callback : callable, optional
        Called with (optimizable, positions to go back to, energy, energy before) whenever that happens.
    **kwargs
        For `BPTTOptimizer`: append_trajectory, adjoint, record, ...
    """

    def __init__(
        self,
        atoms: Any,
        restart: str | Path | None = None,
        logfile: IO | str | Path | None = "-",
        trajectory: Any = None,
        dt: float = 0.1,
        maxstep: float | None = None,
        maxmove: float | None = None,
        dtmax: float = 1.0,
        Nmin: int = 5,
        finc: float = 1.1,
        fdec: float = 0.5,
        astart: float = 0.1,
        fa: float = 0.99,
        a: float = 0.1,
        downhill_check: bool = False,
        position_reset_callback: Callable[[Any, np.ndarray, float, float], Any] | None = None,
        **kwargs: Any,
    ):
        if maxmove is not None:
            warnings.warn("maxmove is called maxstep now.", FutureWarning, stacklevel=2)
            maxstep = maxmove if maxstep is None else maxstep
        self.downhill_check = downhill_check
        self.position_reset_callback = position_reset_callback
        self._last: _Place | None = None
        numbers: dict[str, Any] = {
            "dt": dt, "dtmax": dtmax, "Nmin": Nmin, "finc": finc, "fdec": fdec, "astart": astart, "fa": fa, "a": a,
        }  # fmt: skip
        kwargs["record"] = kwargs.get("record", True) and not downhill_check
        super().__init__(atoms, restart, logfile, trajectory, maxstep=maxstep, stepper="fire", **numbers, **kwargs)

    def initialize(self) -> None:
        super().initialize()
        self._last = None

    @property
    def relaxation(self) -> Relaxation:
        if self.downhill_check:
            raise RuntimeError("A run with downhill_check=True cannot be differentiated: run it without.")
        return super().relaxation

    def _before_frame(self) -> None:
        """Undo the last step where it led uphill."""
        if not self.downhill_check:
            return
        assert self._state is not None
        target, last = self.optimizable, self._last
        if last is not None and (energy := target.get_value()) > last.energy:
            if self.position_reset_callback is not None:
                self.position_reset_callback(target, last.x, energy, last.energy)
            target.set_x(last.x)
            # Without velocity the power is zero, which is what the rule takes for uphill.
            self._state.atoms["velocities"] = torch.zeros_like(self._state.atoms["velocities"])
        self._last = _Place(float(target.get_value()), target.get_x())

    def _saved(self) -> dict[str, Any]:
        return super()._saved() | {"last": None if self._last is None else [self._last.energy, self._last.x.tolist()]}

    def _take(self, saved: dict[str, Any]) -> None:
        super()._take(saved)
        if self.downhill_check and saved.get("last"):
            energy, x = saved["last"]
            self._last = _Place(energy, np.array(x))


class _Place(NamedTuple):
    energy: float
    x: np.ndarray


class BFGS(BPTTOptimizer):
    """BFGS with the arguments of `ase.optimize.BFGS`, in their order.

    >>> from ase_bptt import TorchCalculator
    >>> atoms = ase.Atoms("N2", [(0, 0, 0), (0, 0, 1.1)], calculator=TorchCalculator("emt"))
    >>> bool(BFGS(atoms, logfile=None).run(fmax=0.01))
    True

    Parameters
    ----------
    atoms, restart, logfile, trajectory, append_trajectory
        As for `BPTTOptimizer`.
    maxstep, alpha
        As for `steppers.BFGS`; None is its default.
    **kwargs
        For `BPTTOptimizer`.
    """

    def __init__(
        self,
        atoms: Any,
        restart: str | Path | None = None,
        logfile: IO | str | Path | None = "-",
        trajectory: Any = None,
        append_trajectory: bool = False,
        maxstep: float | None = None,
        alpha: float | None = None,
        **kwargs: Any,
    ):
        given: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
        super().__init__(
            atoms, restart, logfile, trajectory, append_trajectory, maxstep, stepper="bfgs", **given, **kwargs
        )

    @property
    def alpha(self) -> float:
        """The curvature of the first Hessian, in eV/Å^2."""
        return self.stepper.alpha  # type: ignore[return-value]

    @property
    def H0(self) -> np.ndarray:
        """The first Hessian, in eV/Å^2; may be set before the first step."""
        state = self._state
        return np.eye(self.optimizable.ndofs()) * self.alpha if state is None else state.lists["hessian"][0].numpy()

    @H0.setter
    def H0(self, hessian: np.ndarray) -> None:
        self._state = self._first_state()
        self._state.lists["hessian"] = (torch.tensor(np.asarray(hessian), dtype=torch.float64),)

    @property
    def H(self) -> np.ndarray:
        """The Hessian so far, in eV/Å^2; there is none before the first step."""
        if self._state is None:
            raise AttributeError("There is no Hessian before the first step.")
        return self._state.lists["hessian"][0].numpy()


class LBFGS(BPTTOptimizer):
    """LBFGS with the arguments of `ase.optimize.LBFGS`, in their order.

    >>> from ase_bptt import TorchCalculator
    >>> atoms = ase.Atoms("N2", [(0, 0, 0), (0, 0, 1.1)], calculator=TorchCalculator("emt"))
    >>> bool(LBFGS(atoms, logfile=None, memory=10).run(fmax=0.01))
    True

    Parameters
    ----------
    atoms, restart, logfile, trajectory
        As for `BPTTOptimizer`.
    maxstep, memory, damping, alpha
        As for `steppers.LBFGS`.
    use_line_search : bool
        Only False.
    **kwargs
        For `BPTTOptimizer`: append_trajectory, ...

    Raises
    ------
    NotImplementedError
        For use_line_search=True.
    """

    def __init__(
        self,
        atoms: Any,
        restart: str | Path | None = None,
        logfile: IO | str | Path | None = "-",
        trajectory: Any = None,
        maxstep: float | None = None,
        memory: int = 100,
        damping: float = 1.0,
        alpha: float = 70.0,
        use_line_search: bool = False,
        **kwargs: Any,
    ):
        if use_line_search:
            raise NotImplementedError(
                "This LBFGS searches along no line: take ase.optimize.LBFGSLineSearch, or QuasiNewton from here."
            )
        numbers: dict[str, Any] = {"memory": memory, "damping": damping, "alpha": alpha}
        super().__init__(atoms, restart, logfile, trajectory, maxstep=maxstep, stepper="lbfgs", **numbers, **kwargs)


class BFGSLineSearch(ase.optimize.BFGSLineSearch):
    """ASE's own BFGSLineSearch, also called QuasiNewton, with whole restarts and a stop at forces that are not finite.

    A step evaluates energies and forces at as many points as its search along a line needs, so it is no
    `steppers.Stepper`, runs only on ASE's side, and leaves no `relaxation`. Arguments are ASE's.

    >>> from ase_bptt import TorchCalculator
    >>> atoms = ase.Atoms("N2", [(0, 0, 0), (0, 0, 1.1)], calculator=TorchCalculator("emt"))
    >>> bool(QuasiNewton(atoms, logfile=None).run(fmax=0.01))
    True
    """

    @wraps(ase.optimize.BFGSLineSearch.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        refuse_unknown(ase.optimize.BFGSLineSearch, kwargs)
        super().__init__(*args, **kwargs)

    REMEMBERED = ("r0", "g0", "e0", "task", "H", "p", "alpha_k", "no_update")

    def read(self) -> None:
        """Take the whole state from the restart file."""
        try:
            saved = read_restart(self)
            state = {name: saved[name] for name in self.REMEMBERED}
            if np.shape(state["r0"]) != (self.optimizable.ndofs(),):
                raise ValueError(f"it is of {np.size(state['r0'])} variables, not {self.optimizable.ndofs()}")
            vars(self).update(state)
            filter_from_json(saved["filter"], self.atoms)
        except BROKEN as error:
            raise unreadable(self, error) from error
        self.load_restart = True

    def dump(self, data: Any) -> None:
        """Write the restart file with what the next step needs, which is more than ASE's data."""
        state = {name: getattr(self, name) for name in self.REMEMBERED}
        write_restart(self, state | {"filter": filter_to_json(self.atoms)})

    def step(self, gradient: Any = None) -> None:
        """One search along a line."""
        start = self.optimizable.get_x()
        try:
            super().step(gradient)
        except _NotFinite:
            self.optimizable.set_x(start)
            stop(self)

    def _get_gradient(self, forces: Any = None) -> np.ndarray:
        return self._check(super()._get_gradient(forces))

    def func(self, x: np.ndarray) -> float:
        return self._check(super().func(x))

    def fprime(self, x: np.ndarray) -> np.ndarray:
        return self._check(super().fprime(x))

    def _check(self, values: Any) -> Any:
        if not np.isfinite(values).all():
            raise _NotFinite
        return values

    @property
    def relaxation(self) -> Relaxation:
        """None: a RuntimeError that says why."""
        raise RuntimeError(not_differentiable(type(self).__name__, "a line search"))


class _NotFinite(ArithmeticError):
    """An energy or a force that is not finite."""


QuasiNewton = BFGSLineSearch
