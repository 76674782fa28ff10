"""The iterated map X(t+1) = step(X(t), F(X(t))), one frame of it, and the trajectory that a run leaves."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .neighbors import NeighborList
from .potential import Potential
from .steppers import State, Stepper
from .structures import Structures
from .utils import counted
from .weights import weights_version


@dataclass(eq=False)
class IteratedMap:
    """X(t+1) = step(X(t), F(X(t))): a potential and a stepper.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import Structures, load_potential
    >>> from ase_bptt.iterated_map import IteratedMap
    >>> from ase_bptt.steppers import GradientDescent
    >>> iterated = IteratedMap(load_potential("emt"), GradientDescent(step_size=0.005))
    >>> start = Structures.from_atoms([molecule("N2")])
    >>> positions, state = iterated.frame(start, iterated.start(start), iterated.neighbor_list())
    >>> positions.shape, positions.requires_grad
    (torch.Size([2, 3]), True)
    """

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
        """One frame on the tape of autograd, forces included."""
        _, forces = self.potential.energy_and_forces(structures, neighbors(structures), create_graph=True)
        structures, state = self.advance(structures, state, forces)
        return structures.positions, state

    def start(self, structures: Structures) -> State:
        """The stepper's state before the first frame."""
        return self.stepper.start(structures.positions, len(structures), structures.numbers)

    def neighbor_list(self) -> NeighborList:
        return NeighborList(self.potential.cutoff)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the potential and of the stepper that require gradients."""
        every = (*self.potential.parameters(), *self.stepper.parameters())
        return [p for p in every if p.requires_grad]

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes whenever a weight, a buffer or a hyperparameter of the stepper is changed or replaced."""
        return (*weights_version(self.potential, self.stepper), self.stepper.todict())


class Status(enum.Enum):
    """How the relaxation of a structure ended; `sentence` explains it.

    >>> from ase.build import molecule
    >>> from ase_bptt import Status, relax
    >>> relax("emt", molecule("N2"), steps=1).status[0] is Status.OUT_OF_STEPS
    True
    >>> Status.OUT_OF_STEPS.sentence
    'The last step was taken before all forces fell below fmax: give it more steps.'
    """

    CONVERGED = "converged"
    OUT_OF_STEPS = "out of steps"
    DIVERGED = "diverged"

    @property
    def sentence(self) -> str:
        return {
            Status.CONVERGED: "All forces fell below fmax.",
            Status.OUT_OF_STEPS: "The last step was taken before all forces fell below fmax: give it more steps.",
            Status.DIVERGED: "Its forces are not finite, or it ended higher in energy than it started: "
            "the step size is too large for its stiffest bond, or the potential is too attractive at short range.",
        }[self]


@dataclass(eq=False)
class End:
    """Where one structure ended.

    Attributes
    ----------
    positions : Tensor, shape (n_atoms, 3)
        In Å, attached to whatever graph the frames were recorded on.
    forces : Tensor, shape (n_atoms, 3)
        In eV/Å, detached; constraints are not applied.
    energy : Tensor, shape ()
        In eV, detached.
    status : Status
    nsteps : int
        Frames that it took.
    """

    positions: Tensor
    energy: Tensor
    forces: Tensor
    status: Status
    nsteps: int

    def __repr__(self) -> str:
        return f"End({counted(len(self.positions), 'atom')}, {self.status.value} after {counted(self.nsteps, 'frame')})"


@dataclass(frozen=True)
class Checkpointing:
    """Of which frames a trajectory keeps the stepper's state; frames in between are recomputed.

    Attributes
    ----------
    every : int
        Keep every `every`-th frame.
    last : int or None
        Keep only the last `last` frames of each structure.
    forces : bool
        The forces of each frame, too.

    Examples
    --------
    >>> from ase_bptt.iterated_map import Checkpointing
    >>> Checkpointing(every=5)  # as Replay(every=5) keeps them
    Checkpointing(every=5, last=None, forces=False)
    """

    every: int = 1
    last: int | None = None
    forces: bool = False


Kept = tuple[Tensor, State]


@dataclass(eq=False)
class Trajectory:
    """What a run leaves behind, from which the frames that `checkpointing` covers can be computed again.

    Attributes
    ----------
    map : IteratedMap
    start : Structures
        Before the first frame; its positions may require gradients.
    checkpointing : Checkpointing or None
        Which frames are kept; None where none are.
    frames : list of (Tensor, State), None for those that are not kept
        Positions and stepper state before each frame, detached, of the structures that were still
        moving: those with ``nsteps > t``, in order.
    forces : list of Tensor or None
        Of each frame, in eV/Å, without constraints; None where they are not kept.
    nsteps : list of int, length n
        Frames of each structure.
    ends : dict of End
        Where each structure ended, by its index in `start`.
    weights : tuple
        Fingerprint of the weights that the frames were computed with.
    adjoint_norms : Tensor or None, shape (n_frames + 1, n)
        |dL/dX(t)| of each structure before each frame and at the end, after a backward pass through the frames.
    solves : tuple
        How the equation of each structure was solved, after a backward pass through the minimum.
    warns : bool
        Whether that backward pass warns of structures whose equation was not solved; False where `solves` is read.
    """

    map: IteratedMap
    start: Structures
    checkpointing: Checkpointing | None = None
    frames: list[Kept | None] = field(default_factory=list)
    forces: list[Tensor | None] = field(default_factory=list)
    nsteps: list[int] = field(default_factory=list)
    ends: dict[int, End] = field(default_factory=dict)
    weights: tuple[Any, ...] = ()
    adjoint_norms: Tensor | None = None
    solves: tuple[Any, ...] = ()
    warns: bool = True

    def __repr__(self) -> str:
        kept = "kept" if self.checkpointing else "not kept"
        return f"Trajectory({len(self.start)} in all, {max(self.nsteps, default=0)} frames at most, {kept})"

    def __post_init__(self) -> None:
        self.weights = self.weights or self.map.fingerprint()
        self.nsteps = self.nsteps or [0] * len(self.start)

    @cached_property
    def final(self) -> Tensor:
        """Where each structure ended, in Å, shape (n_atoms, 3), before any adjoint."""
        return torch.cat([self.ends[k].positions for k in range(len(self.start))])

    def end(self, ends: Mapping[int, End]) -> None:
        """Structures of these indices have ended."""
        self.ends |= ends
        for k, end in ends.items():
            self.nsteps[k] = end.nsteps

    def keep(self, positions: Tensor, state: State, forces: Tensor | None = None) -> None:
        """Keep the state before a frame, if it is one of those that are kept."""
        t, kept = len(self.frames), self.checkpointing or Checkpointing()
        wanted = t % kept.every == 0
        self.frames.append((positions.detach(), state.map(Tensor.detach)) if wanted else None)
        self.forces.append(forces.detach() if forces is not None and kept.forces else None)
        if kept.last is not None and t >= kept.last:
            old = t - kept.last
            # A structure that has stopped before needs its own last ones.
            if not any(n - kept.last <= old < n for n in self.nsteps):
                self.frames[old] = None

    def kept(self, t: int) -> Kept | None:
        """Positions and stepper state before frame t, where and in the dtype the potential computes; None if not kept.

        Of all structures that took the frame; `ase_bptt.adjoints.backward_sweep.Frames` recomputes those not kept.
        """
        like, kept = self.start.positions, self.frames[t]
        if kept is None:
            return None
        positions, state = kept
        return positions.to(like), state.map(lambda s: s.to(like) if s.is_floating_point() else s.to(like.device))

    def forces_before(self, t: int, members: list[int]) -> Tensor | None:
        """The forces by which these structures took frame t, where they are kept."""
        forces = self.forces[t] if t < len(self.forces) else None
        if forces is None or members == self.moving(t):
            return forces
        return forces[self.places(t, members)[1]]

    def moving(self, t: int) -> list[int]:
        """The structures that took frame t."""
        return [k for k, n in enumerate(self.nsteps) if n > t]

    def places(self, t: int, members: list[int]) -> tuple[list[int], Tensor]:
        """Where these structures, and their atoms, are among those that took frame t."""
        moving = self.moving(t)
        rows = [moving.index(k) for k in members]
        return rows, self.start.select(moving).atoms_of(rows)

    def check_weights(self) -> None:
        """Raise RuntimeError if the weights are not those of the run any more."""
        if self.map.fingerprint() != self.weights:
            raise RuntimeError(
                "The weights of the potential or the stepper were changed after this relaxation, so its "
                "gradient would belong to another model: call backward before the optimizer's step, or "
                "relax again."
            )
