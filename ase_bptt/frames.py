"""The iterated map, one frame of it, and the record of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .neighbors import NeighborList
from .potential import Potential
from .steppers import State, Stepper
from .structures import Structures
from .weights import Versions, Weights


@dataclass(eq=False)
class IteratedMap:
    """X(t+1) = step(X(t), F(X(t))): a potential and a stepper."""

    potential: Potential
    stepper: Stepper

    def advance(self, structures: Structures, state: State, forces: Tensor) -> tuple[Structures, State]:
        """One frame from forces that are known, under the constraints of the structures."""
        before = structures.positions
        positions, state = self.stepper.step(before, structures.project_forces(forces), state, structures.batch)
        if structures.step_map is not None:
            positions = before + structures.project_steps(positions - before)
        return structures.replace(positions=positions), state

    def frame(self, structures: Structures, state: State, neighbors: NeighborList) -> tuple[Tensor, State]:
        """One frame on autograd's tape, forces included."""
        _, forces = self.potential.energy_and_forces(structures, neighbors(structures), create_graph=True)
        structures, state = self.advance(structures, state, forces)
        return structures.positions, state

    def start(self, structures: Structures) -> State:
        """The stepper's state before the first frame."""
        return self.stepper.begin(structures.positions, len(structures), structures.numbers)

    def neighbor_list(self) -> NeighborList:
        return NeighborList(self.potential.cutoff)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the potential and of the stepper that require gradients."""
        every = (*self.potential.parameters(), *self.stepper.parameters())
        return [p for p in every if p.requires_grad]

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self.potential, self.stepper)

    def fingerprint(self) -> Versions:
        """Changes whenever a weight is changed in place or replaced."""
        return self._weights.versions()


@dataclass(eq=False)
class Record:
    """What a run leaves behind, from which any frame can be run again.

    Attributes
    ----------
    map : IteratedMap
    start : Structures
        Before the first frame; its positions may require gradients.
    frames : list of (Tensor, State)
        Positions and stepper state before each frame, detached, of the structures that were still
        moving: those with ``nsteps > t``, in order.
    nsteps : list of int, length n
        Frames of each structure.
    final : Tensor, shape (n_atoms, 3)
        Where each ended, in Å.
    weights : tuple
        Fingerprint of the weights that the frames were run with.
    """

    map: IteratedMap
    start: Structures
    frames: list[tuple[Tensor, State]] = field(default_factory=list)
    nsteps: list[int] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    weights: Versions = ()

    def __post_init__(self) -> None:
        self.weights = self.weights or self.map.fingerprint()

    def keep(self, positions: Tensor, state: State) -> None:
        """Store the state before a frame."""
        self.frames.append((positions.detach(), state.map(Tensor.detach)))

    def before(self, t: int) -> tuple[Tensor, State]:
        """Positions and stepper state before frame t, where and in the dtype the potential computes."""
        like = self.start.positions
        positions, state = self.frames[t]
        return positions.to(like), state.map(lambda s: s.to(like) if s.is_floating_point() else s.to(like.device))

    def moving(self, t: int) -> list[int]:
        """The structures that took frame t."""
        return [k for k, n in enumerate(self.nsteps) if n > t]

    def check_weights(self) -> None:
        """Raise RuntimeError if the weights are not those of the run any more."""
        if self.map.fingerprint() != self.weights:
            raise RuntimeError(
                "The weights of the potential or the stepper were changed after this relaxation, so its "
                "gradient would belong to another model: call backward before the optimizer's step, or "
                "relax again."
            )
