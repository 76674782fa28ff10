"""Update rules: from positions and forces of one frame to the positions of the next.

They are pure and out of place, so that autograd can follow them, and hold nothing of a run: what
travels from frame to frame is in the State. The same code moves ASE's optimizer and the tape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .positive import check_positive


@dataclass(eq=False)
class State:
    """What a stepper carries from frame to frame.

    Attributes
    ----------
    atoms : dict of Tensor, each (n_atoms, 3)
    structures : dict of Tensor, each (n,)
    """

    atoms: dict[str, Tensor] = field(default_factory=dict)
    structures: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Any) -> State:
        """The state with a function applied to each tensor."""
        return State(
            {k: function(v) for k, v in self.atoms.items()},
            {k: function(v) for k, v in self.structures.items()},
        )

    def select(self, atoms: Tensor, structures: Tensor) -> State:
        """The state of some structures, given their atoms' indices and their own."""
        return State(
            {k: v[atoms] for k, v in self.atoms.items()},
            {k: v[structures] for k, v in self.structures.items()},
        )

    def floats(self) -> list[Tensor]:
        """The differentiable tensors, in a fixed order."""
        every = [*self.atoms.values(), *self.structures.values()]
        return [t for t in every if t.is_floating_point()]

    def with_floats(self, values: list[Tensor]) -> State:
        """The state with its differentiable tensors replaced, in the order of `floats`."""
        queue = iter(values)
        return self.map(lambda t: next(queue) if t.is_floating_point() else t)


class Stepper(nn.Module):
    """Base class of the update rules. Their numbers may be nn.Parameters."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Names of the numbers, as in the constructor."""
    differentiable: ClassVar[bool] = True

    def init(self, positions: Tensor, n: int) -> State:
        """The state before the first frame of n structures."""
        raise NotImplementedError

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        """One frame.

        Parameters
        ----------
        positions, forces : Tensor, shape (n_atoms, 3)
            In Å and eV/Å.
        state : State
        batch : Tensor of int64, shape (n_atoms,)
            The structure that each atom belongs to.
        """
        raise NotImplementedError

    def todict(self) -> dict[str, Any]:
        """Name and numbers, as JSON."""
        return {"name": self.name} | {k: _number(getattr(self, k)) for k in self.fields}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.todict().items() if k != "name")


class GradientDescent(Stepper):
    """v <- momentum v + F;  X <- X + eta anneal^t v  (arXiv 2512.01067, with its annealed step).

    Parameters
    ----------
    step_size : float or Parameter
        eta in Å^2/eV. Stable below 2/lambda_max of the Hessian.
    anneal : float or Parameter
        Factor by which the step size falls with each frame.
    momentum : float or Parameter
    maxstep : float
        Å. The longest atom step of a structure is capped by this, the others in proportion.
    """

    name = "gd"
    fields = ("step_size", "anneal", "momentum", "maxstep")

    def __init__(
        self,
        step_size: float | nn.Parameter = 0.05,
        anneal: float | nn.Parameter = 1.0,
        momentum: float | nn.Parameter = 0.0,
        maxstep: float = 0.2,
    ):
        super().__init__()
        check_positive(step_size=step_size, anneal=anneal, maxstep=maxstep)
        self.step_size = step_size
        self.anneal = anneal
        self.momentum = momentum
        self.maxstep = maxstep

    def init(self, positions: Tensor, n: int) -> State:
        state = State(structures={"frame": positions.new_zeros(n, dtype=torch.int64)})
        if self._has_momentum():
            state.atoms["velocities"] = torch.zeros_like(positions)
        return state

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        frame = state.structures["frame"]
        velocities = forces
        atoms = {}
        if self._has_momentum():
            velocities = self.momentum * state.atoms["velocities"] + forces
            atoms = {"velocities": velocities}
        anneal = torch.as_tensor(self.anneal, dtype=positions.dtype, device=positions.device)
        eta = self.step_size * anneal ** frame.to(positions.dtype)
        moves = eta[batch, None] * velocities
        longest = frame.new_zeros(len(frame), dtype=moves.dtype).scatter_reduce(0, batch, moves.square().sum(1), "amax")
        moves = moves * _cap(longest, self.maxstep)[batch, None]
        return positions + moves, State(atoms, {"frame": frame + 1})

    def _has_momentum(self) -> bool:
        return isinstance(self.momentum, nn.Parameter) or self.momentum != 0


class FIRE(Stepper):
    """Fast inertial relaxation engine (Bitzek et al., PRL 97, 170201 (2006)), by ASE's formulas.

    Names and defaults are those of ase.optimize.FIRE; all norms and branches are per structure.

    Parameters
    ----------
    dt : float or Parameter
        First time step.
    maxstep : float
        Å. As in ASE, caps the norm of the whole structure's step, not of each atom's.
    dtmax, Nmin, finc, fdec, astart, fa, a
        Largest time step; downhill steps before it grows; its growth and its fall; mixing after
        an uphill step; decay of the mixing; first mixing.
    """

    name = "fire"
    fields = ("dt", "maxstep", "dtmax", "Nmin", "finc", "fdec", "astart", "fa", "a")

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
        power, f2, v2 = (_dot(x, y, batch, len(dt)) for x, y in ((forces, v), (forces, forces), (v, v)))
        down = started & (power > 0)
        up = started & ~down

        # Guarded inside as well as outside: sqrt has no finite slope at zero.
        ratio = a * torch.where(down, v2, 1.0).sqrt() / torch.where(down, f2, 1.0).sqrt()
        mixed = (1 - a)[batch, None] * v + ratio[batch, None] * forces
        v = torch.where(down[batch, None], mixed, 0.0)

        grow = down & (downhill > self.Nmin)
        dt = torch.where(grow, (dt * self.finc).clamp(max=self.dtmax), torch.where(up, dt * self.fdec, dt))
        a = torch.where(grow, a * self.fa, torch.where(up, a.new_ones(()) * self.astart, a))
        downhill = torch.where(down, downhill + 1, torch.where(up, 0, downhill))

        v = v + dt[batch, None] * forces
        moves = dt[batch, None] * v
        moves = moves * _cap(_dot(moves, moves, batch, len(dt)), self.maxstep)[batch, None]
        structures = {"dt": dt, "a": a, "downhill": downhill, "started": torch.ones_like(started)}
        return positions + moves, State({"velocities": v}, structures)


STEPPERS: dict[str, type[Stepper]] = {cls.name: cls for cls in (GradientDescent, FIRE)}


def make_stepper(stepper: str | Stepper | None, **numbers: Any) -> Stepper:
    """A stepper by name ("gd", "fire") with its numbers, or the object itself; None is FIRE.

    Raises TypeError for numbers that the stepper does not have, ValueError for unknown names.
    """
    if isinstance(stepper, Stepper):
        if numbers:
            raise TypeError(f"Set {', '.join(numbers)} on the stepper object itself, not beside it.")
        return stepper
    name = stepper or "fire"
    if name not in STEPPERS:
        raise ValueError(f"There is no stepper {name!r}; there are {', '.join(STEPPERS)}.")
    unknown = set(numbers) - set(STEPPERS[name].fields)
    if unknown:
        raise TypeError(f"The stepper {name!r} has no {', '.join(sorted(unknown))}.")
    return STEPPERS[name](**numbers)


def _dot(x: Tensor, y: Tensor, batch: Tensor, n: int) -> Tensor:
    """Scalar product of each structure, shape (n,)."""
    return x.new_zeros(n).index_add(0, batch, (x * y).sum(1))


def _cap(square: Tensor, maxstep: float) -> Tensor:
    """Factor that brings a length down to maxstep, given its square; 1 where it is short enough."""
    too_long = square > maxstep**2
    return torch.where(too_long, maxstep / torch.where(too_long, square, 1.0).sqrt(), 1.0)


def _number(value: Any) -> float | int:
    return value.item() if isinstance(value, Tensor) else value
