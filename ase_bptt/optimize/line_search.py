"""BFGS with a line search, which ASE also calls QuasiNewton."""

from __future__ import annotations

from typing import Any

import ase.optimize
import numpy as np

from ..optimizer import not_differentiable, stop
from ..restart import BROKEN, read_restart, unreadable, write_restart
from ..result import Relaxation


class BFGSLineSearch(ase.optimize.BFGSLineSearch):
    """ASE's own BFGSLineSearch, also called QuasiNewton, with whole restarts and a stop at forces that are not finite.

    A step evaluates energies and forces at as many points as its search along a line needs, so it is no
    `steppers.Stepper`, runs only on ASE's side, and leaves no `relaxation`. Arguments are ASE's.
    """

    REMEMBERED = ("r0", "g0", "e0", "task", "H", "p", "alpha_k", "no_update")

    def read(self) -> None:
        """Take the whole state from the restart file."""
        try:
            saved = read_restart(self)
            state = {name: saved[name] for name in self.REMEMBERED}
            if np.shape(state["r0"]) != (self.optimizable.ndofs(),):
                raise ValueError(f"it is of {np.size(state['r0'])} variables, not {self.optimizable.ndofs()}")
            vars(self).update(state)
            if saved["orig_cell"] is not None:
                filtered: Any = self.atoms
                filtered.orig_cell = saved["orig_cell"]
        except BROKEN as error:
            raise unreadable(self, error) from error
        self.load_restart = True

    def dump(self, data: Any) -> None:
        """Write the restart file with what the next step needs, which is more than ASE's data."""
        state = {name: getattr(self, name) for name in self.REMEMBERED}
        write_restart(self, state | {"orig_cell": getattr(self.atoms, "orig_cell", None)})

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
