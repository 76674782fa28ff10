"""BFGS and LBFGS, as ASE calls them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..optimizer import BPTTOptimizer


class BFGS(BPTTOptimizer):
    """BFGS with the arguments of `ase.optimize.BFGS`, in their order.

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
        """The curvature that the Hessian begins with, in eV/Å^2."""
        return self.stepper.alpha  # type: ignore[return-value]

    @property
    def H0(self) -> np.ndarray:
        """The first Hessian, in eV/Å^2; may be set before the first step."""
        begun = self._state
        return np.eye(self.optimizable.ndofs()) * self.alpha if begun is None else begun.lists["hessian"][0].numpy()

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
