"""FIRE, by ASE's formulas."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..utils import check_positive
from .hyperparameters import SMALLEST, Ranges
from .stepper import State, Stepper, cap, dot, spread


class FIRE(Stepper):
    """Fast inertial relaxation engine (Bitzek et al., PRL 97, 170201 (2006)), by ASE's formulas.

    Names and defaults are those of ase.optimize.FIRE; all norms and branches are per structure.

    Parameters
    ----------
    dt : float or Parameter
        First time step.
    maxstep : float
        Å. As in ASE, caps the norm of the whole structure's step, not of each atom's.
    dtmax : float
        Largest time step.
    Nmin : int
        Downhill steps before the time step grows.
    finc, fdec : float or Parameter
        Factors by which the time step grows, and shrinks after an uphill step.
    astart, fa, a : float or Parameter
        Mixing of velocity and force after an uphill step; the factor by which it decays; its first value.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import relax, steppers
    >>> relax("emt", molecule("N2"), stepper=steppers.FIRE(dt=0.05))
    Relaxation: N2, converged after 22 frames, energy 0.2628 eV, fmax 0.0269 eV/Å
    """

    name = "fire"
    fields = ("dt", "maxstep", "dtmax", "Nmin", "finc", "fdec", "astart", "fa", "a")
    learnable: ClassVar[Ranges] = {
        "dt": (SMALLEST, "dtmax"),
        "finc": (1.0, math.inf),
        "fdec": (SMALLEST, 1.0),
        "a": (0.0, 1.0),
        "astart": (0.0, 1.0),
        "fa": (0.0, 1.0),
    }

    def __init__(
        self,
        dt: float | nn.Parameter = 0.1,
        maxstep: float = 0.2,
        dtmax: float = 1.0,
        Nmin: int = 5,
        finc: float | nn.Parameter = 1.1,
        fdec: float | nn.Parameter = 0.5,
        astart: float | nn.Parameter = 0.1,
        fa: float | nn.Parameter = 0.99,
        a: float | nn.Parameter = 0.1,
    ):
        super().__init__()
        check_positive(dt=dt, dtmax=dtmax, maxstep=maxstep)
        self.dt, self.dtmax, self.finc, self.fdec = dt, dtmax, finc, fdec
        self.a, self.astart, self.fa = a, astart, fa
        self.maxstep = maxstep
        self.Nmin = Nmin

    def init(self, positions: Tensor, n: int) -> State:
        ones = positions.new_ones(n)
        return State(
            {"velocities": torch.zeros_like(positions)},
            {
                "dt": ones * self.dt,
                "a": ones * self.a,
                "downhill": positions.new_zeros(n, dtype=torch.int64),
                "started": positions.new_zeros(n, dtype=torch.bool),
            },
        )

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        v = state.atoms["velocities"]
        dt, a, downhill, started = (state.structures[k] for k in ("dt", "a", "downhill", "started"))
        power, f2, v2 = (dot(x, y, batch, len(dt)) for x, y in ((forces, v), (forces, forces), (v, v)))
        down = started & (power > 0)
        up = started & ~down

        # Guarded inside as well as outside: sqrt has no finite derivative at zero.
        ratio = a * torch.where(down, v2, 1.0).sqrt() / torch.where(down, f2, 1.0).sqrt()
        mixed = spread(1 - a, batch) * v + spread(ratio, batch) * forces
        v = torch.where(spread(down, batch), mixed, 0.0)

        grow = down & (downhill > self.Nmin)
        dt = torch.where(grow, (dt * self.finc).clamp(max=self.dtmax), torch.where(up, dt * self.fdec, dt))
        a = torch.where(grow, a * self.fa, torch.where(up, a.new_ones(()) * self.astart, a))
        downhill = torch.where(down, downhill + 1, torch.where(up, 0, downhill))

        v = v + spread(dt, batch) * forces
        moves = spread(dt, batch) * v
        moves = moves * spread(cap(dot(moves, moves, batch, len(dt)), self.maxstep), batch)
        structures = {"dt": dt, "a": a, "downhill": downhill, "started": torch.ones_like(started)}
        return positions + moves, State({"velocities": v}, structures)
