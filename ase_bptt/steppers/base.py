"""What every update rule is: a pure step, and a State that travels from frame to frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn


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

    def floats(self) -> list[Tensor]:
        """The differentiable tensors, in a fixed order."""
        listed = [t for tensors in self.lists.values() for t in tensors]
        every = [*self.atoms.values(), *self.structures.values(), *listed]
        return [t for t in every if t.is_floating_point()]

    def with_floats(self, values: list[Tensor]) -> State:
        """The state with its differentiable tensors replaced, in the order of `floats`."""
        queue = iter(values)
        return self.map(lambda t: next(queue) if t.is_floating_point() else t)


class Stepper(nn.Module):
    """Base class of the update rules. Their numbers may be nn.Parameters where they are differentiable."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Names of the numbers, as in the constructor."""
    differentiable: ClassVar[bool] = True
    """Whether a gradient can be taken through its steps; if not, `relax` refuses a tape."""

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
            The structure that each atom belongs to, in ascending order.
        """
        raise NotImplementedError

    def todict(self) -> dict[str, Any]:
        """Name and numbers, as JSON."""
        return {"name": self.name} | {k: _number(getattr(self, k)) for k in self.fields}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.todict().items() if k != "name")


class Learner(Stepper):
    """A stepper that learns curvatures from the frames it has seen; a tape refuses it.

    Its state is in float64 whatever the positions are in: curvatures are small differences.
    """

    differentiable = False
    learns_the_end: ClassVar[bool]
    """Whether the last frame of a trajectory is learnt from when it is replayed, as in ASE's rule of this name."""

    def learn(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> State:
        """The state after one more frame has been seen; arguments as for `step`."""
        raise NotImplementedError


def _number(value: Any) -> float | int:
    return value.item() if isinstance(value, Tensor) else value
