"""What every update rule is: a pure step, a State that travels from frame to frame, and sums over each structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .hyperparameters import Ranges, labelled, learnt, plain

Self = TypeVar("Self", bound="Stepper")
UNRESOLVED = "{name}='auto' is no number yet: call resolve_step_size(limit), with the limit 2/lambda_max in Å^2/eV."


@dataclass(eq=False)
class State:
    """What a stepper carries from frame to frame.

    Attributes
    ----------
    atoms : dict of Tensor
        The first axis is the atoms of all structures: (n_atoms, 3), or (n_atoms, m, 3) for m frames.
    structures : dict of Tensor
        The first axis is the structures: (n,).
    lists : dict of tuple of Tensor
        One tensor for each structure, of a size of its own, such as its Hessian.

    Examples
    --------
    >>> import torch
    >>> state = State(atoms={"velocities": torch.ones(3, 3)}, structures={"frame": torch.tensor([4, 7])})
    >>> state.select(torch.tensor([2]), torch.tensor([1])).structures["frame"].tolist()
    [7]
    """

    atoms: dict[str, Tensor] = field(default_factory=dict)
    structures: dict[str, Tensor] = field(default_factory=dict)
    lists: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with a function applied to each tensor."""
        return State(
            {k: function(v) for k, v in self.atoms.items()},
            {k: function(v) for k, v in self.structures.items()},
            {k: tuple(map(function, v)) for k, v in self.lists.items()},
        )

    def select(self, atoms: Tensor, structures: Tensor) -> State:
        """The state of some structures, given their atoms' indices and their own."""
        return State(
            {k: v[atoms] for k, v in self.atoms.items()},
            {k: v[structures] for k, v in self.structures.items()},
            {k: tuple(v[i] for i in structures.tolist()) for k, v in self.lists.items()},
        )

    def joined(self, other: State) -> State:
        """The states of two batches as one; a history of fewer frames is filled up with zeros in front."""
        return State(
            {k: _joined(v, other.atoms[k]) for k, v in self.atoms.items()},
            {k: torch.cat((v, other.structures[k])) for k, v in self.structures.items()},
            {k: v + other.lists[k] for k, v in self.lists.items()},
        )

    def floats(self) -> list[Tensor]:
        """The differentiable tensors, in a fixed order."""
        listed = [t for tensors in self.lists.values() for t in tensors]
        every = [*self.atoms.values(), *self.structures.values(), *listed]
        return [t for t in every if t.is_floating_point()]

    def with_floats(self, values: list[Tensor]) -> State:
        """The state with its differentiable tensors replaced, in the order of `floats`."""
        queue = iter(values)
        return self.map(lambda t: next(queue) if t.is_floating_point() else t)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() > 2:
        frames = max(a.shape[1], b.shape[1])
        a, b = (nn.functional.pad(x, (0, 0, frames - x.shape[1], 0)) for x in (a, b))
    return torch.cat((a, b))


class Stepper(nn.Module):
    """Base class of the update rules. Their hyperparameters may be nn.Parameters where they are differentiable.

    >>> class Plain(Stepper):  # X <- X + F/20
    ...     name, fields = "plain", ()
    ...     def init(self, positions, n):
    ...         return State()
    ...     def step(self, positions, forces, state, batch):
    ...         return positions + 0.05 * forces, state
    >>> from ase.build import molecule
    >>> from ase_bptt import relax
    >>> relax("emt", molecule("N2"), stepper=Plain(), steps=5).nsteps.tolist()
    [5]
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Names of the hyperparameters, as in the constructor."""
    learnable: ClassVar[Ranges] = {}
    """Fields that may be Parameters, in the order in which they are Parameters of the module, each with the lowest
    and the highest value that it may learn; a name stands for the value of that field."""
    differentiable: ClassVar[bool] = True
    """Whether a gradient can be taken through its steps; if not, `relax` refuses a tape."""

    scale_sensitive: ClassVar[bool] = False
    """Whether soft and stiff rows need a common scale, as where one step size serves atoms and cells."""

    def init(self, positions: Tensor, n: int) -> State:
        """The state before the first frame of n structures."""
        raise NotImplementedError

    def start(self, positions: Tensor, n: int, numbers: Tensor | None = None) -> State:
        """The state before the first frame: `init`, and what the rule must know of the atoms.

        Parameters
        ----------
        positions : Tensor, shape (n_atoms, 3)
        n : int
        numbers : Tensor of int64, shape (n_atoms,), optional
            Atomic numbers; None where the rows are not atoms, as those of filters and bands.
        """
        return self.init(positions, n)

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        """One frame.

        Parameters
        ----------
        positions, forces : Tensor, shape (n_atoms, 3)
            In Å and eV/Å.
        state : State
        batch : Tensor of int64, shape (n_atoms,)
            The structure that each atom belongs to, in ascending order.
        """
        raise NotImplementedError

    # Learning ---------------------------------------------------------------------------------

    def learn(self: Self, *names: str) -> Self:
        """Make hyperparameters Parameters, in float64, so that a Trainer learns them; those that are some stay so.

        Parameters
        ----------
        *names : str
            Of `learnable`; none means all of them.

        Returns
        -------
        Stepper
            This one.

        Raises
        ------
        ValueError
            For names that cannot be learnt, for hyperparameters out of their range, for "auto" before it is resolved.
        """
        unknown = [name for name in names if name not in self.learnable]
        if unknown or not self.learnable:
            able = f"can learn {', '.join(self.learnable)}" if self.learnable else "can learn nothing"
            refused = f", but not {', '.join(unknown)}" if unknown else ""
            raise ValueError(f"The stepper {self.name!r} {able}{refused}.")
        for name in names or self.learnable:
            self._check_in_range(name)
        for name in names or self.learnable:
            setattr(self, name, learnt(getattr(self, name)))
        # The order in which they became Parameters would be lost in a checkpoint, and an optimizer counts them by it.
        for name in self.learnable:
            if name in self._parameters:
                self._parameters[name] = self._parameters.pop(name)
        return self

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Bring Parameters that have left their range in `learnable` back to its end, in place."""
        for name in self.learnable:
            low, high = self._range(name)
            for number in labelled(name, getattr(self, name)).values():
                if isinstance(number, nn.Parameter) and not low <= number.item() <= high:
                    number.clamp_(low, high)

    def hyperparameters(self) -> dict[str, float]:
        """The learnable hyperparameters, learnt or not; each of several by a label such as "step_size[Si]"."""
        every = [labelled(name, getattr(self, name)) for name in self.learnable]
        return {label: float(plain(number)) for found in every for label, number in found.items()}

    def resolve_step_size(self, limit: float) -> Stepper:
        """The stepper with a number in place of "auto"; this one where nothing is "auto".

        Parameters
        ----------
        limit : float
            2/lambda_max of the Hessian in Å^2/eV, the longest stable step of gradient descent.
        """
        return self

    def _range(self, name: str) -> tuple[float, float]:
        low, high = self.learnable[name]
        return low, plain(getattr(self, high)) if isinstance(high, str) else high

    def _check_in_range(self, name: str) -> None:
        low, high = self._range(name)
        if isinstance(getattr(self, name), str):
            raise ValueError(UNRESOLVED.format(name=name))
        for label, number in labelled(name, getattr(self, name)).items():
            if not low <= plain(number) <= high:
                raise ValueError(f"{label} is {plain(number):g}, and can be learnt from {low:g} to {high:g} only.")

    # Description ------------------------------------------------------------------------------

    def todict(self) -> dict[str, Any]:
        """Name and hyperparameters, as JSON."""
        return {"name": self.name} | {k: plain(getattr(self, k)) for k in self.fields}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.todict().items() if k != "name")


class Learner(Stepper):
    """A stepper that observes curvatures in the frames it has seen; a tape refuses it.

    Its state is in float64 whatever the positions are in: curvatures are small differences.

    >>> from ase_bptt.steppers import BFGS, Learner
    >>> isinstance(BFGS(), Learner), BFGS.differentiable
    (True, False)
    """

    differentiable = False
    learns_the_end: ClassVar[bool]
    """Whether the last frame of a trajectory is learnt from when it is replayed, as in ASE's rule of this name."""

    def observe(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> State:
        """The state after one more frame has been seen; arguments as for `step`."""
        raise NotImplementedError


def dot(x: Tensor, y: Tensor, batch: Tensor, n: int) -> Tensor:
    """Scalar product of each structure, shape (n,)."""
    return x.new_zeros(n).index_add(0, batch, (x * y).sum(1))


def spread(values: Tensor, batch: Tensor) -> Tensor:
    """A number of each structure, (n,), beside its atoms' coordinates: (n_atoms, 1), or (1, 1) for one structure."""
    return values[:, None] if len(values) == 1 else values[batch, None]


def cap(square: Tensor, maxstep: float) -> Tensor:
    """Factor that brings a length down to maxstep, given its square; 1 where it is short enough."""
    too_long = square > maxstep**2
    return torch.where(too_long, maxstep / torch.where(too_long, square, 1.0).sqrt(), 1.0)


def shortened(moves: Tensor, batch: Tensor, n: int, maxstep: float) -> Tensor:
    """Moves with each structure's longest one at maxstep at most, and its others in proportion."""
    square = moves.square().sum(1)
    alone = n == 1 and len(square) > 0
    longest = square.amax(0, keepdim=True) if alone else moves.new_zeros(n).scatter_reduce(0, batch, square, "amax")
    return moves * spread(cap(longest, maxstep), batch)
