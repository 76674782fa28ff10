"""FIRE, as ASE calls it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ..optimizer import BPTTOptimizer
from ..result import Relaxation


class FIRE(BPTTOptimizer):
    """FIRE with the arguments of `ase.optimize.FIRE`, in their order.

    Parameters
    ----------
    atoms, restart, logfile, trajectory
        As for `BPTTOptimizer`.
    dt, maxstep, dtmax, Nmin, finc, fdec, astart, fa, a
        As for `steppers.FIRE`.
    maxmove : float or None
        The old name of maxstep; ASE warns of it, too.
    downhill_check : bool
        After a step that raised the energy, go back to where it began and start from rest. Such a run has no
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
            "dt": dt,
            "dtmax": dtmax,
            "Nmin": Nmin,
            "finc": finc,
            "fdec": fdec,
            "astart": astart,
            "fa": fa,
            "a": a,
        }
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
