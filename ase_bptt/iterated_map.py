"""The iterated map X(t+1) = step(X(t), F(X(t))), one frame of it, and the trajectory of a run."""

from __future__ import annotations

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


Kept = tuple[Tensor, State]


@dataclass(frozen=True)
class Keep:
    """Which frames' states a run stores.

    Attributes
    ----------
    every : int
        Each so many frames; those between are run again when they are asked for.
    last : int or None
        Of each structure no more than this many, its last ones.
    forces : bool
        The forces of each frame, too.
    """

    every: int = 1
    last: int | None = None
    forces: bool = False


@dataclass(eq=False)
class Record:
    """What a run leaves behind, from which any frame can be run again.

    Attributes
    ----------
    map : IteratedMap
    start : Structures
        Before the first frame; its positions may require gradients.
    frames : list of (Tensor, State), None for those that are not stored
        Positions and stepper state before each frame, detached, of the structures that were still
        moving: those with ``nsteps > t``, in order.
    nsteps : list of int, length n
        Frames of each structure.
    final : Tensor, shape (n_atoms, 3)
        Where each ended, in Å.
    weights : tuple
        Fingerprint of the weights that the frames were run with.
    forces : list of Tensor or None
        Of each frame, in eV/Å, without constraints; None where they are not stored.
    kept : Keep
        Which frames are stored.
    relaxed : list of bool, length n
        Whether each ended where its forces fell below fmax.
    adjoint_norms : Tensor or None, shape (n_frames + 1, n)
        |dL/dX(t)| of each structure before each frame and at the end, after a backward pass through the frames.
    solves : tuple
        How the equation of each structure was solved, after a backward pass through the minimum.
    """

    map: IteratedMap
    start: Structures
    frames: list[Kept | None] = field(default_factory=list)
    forces: list[Tensor | None] = field(default_factory=list)
    nsteps: list[int] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    weights: Versions = ()
    kept: Keep = Keep()
    relaxed: list[bool] = field(default_factory=list)
    adjoint_norms: Tensor | None = None
    solves: tuple[Any, ...] = ()
    _again: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = self.weights or self.map.fingerprint()

    def keep(self, positions: Tensor, state: State, forces: Tensor | None = None) -> None:
        """Store the state before a frame, if it is one of those that are kept."""
        t, kept = len(self.frames), self.kept
        wanted = t % kept.every == 0
        self.frames.append((positions.detach(), state.map(Tensor.detach)) if wanted else None)
        self.forces.append(forces.detach() if forces is not None and kept.forces else None)
        if kept.last is not None and t >= kept.last:
            old = t - kept.last
            # A structure that has stopped before needs its own last ones.
            if not any(n - kept.last <= old < n for n in self.nsteps):
                self.frames[old] = None

    def before(self, t: int, members: list[int] | None = None) -> Kept:
        """Positions and stepper state before frame t, where and in the dtype the potential computes.

        Of all structures that took the frame, or of these among them.
        """
        if self.frames[t] is None and t not in self._again:
            self._run_again(t - t % self.kept.every)
        positions, state = self._placed(t) if self.frames[t] is not None else self._again[t]
        if members is None or members == self.moving(t):
            return positions, state
        rows, atoms = self._places(t, members)
        return positions[atoms], state.select(atoms, torch.tensor(rows, device=positions.device))

    def forces_before(self, t: int, members: list[int]) -> Tensor | None:
        """The forces by which these structures took frame t, where they are stored."""
        forces = self.forces[t] if t < len(self.forces) else None
        if forces is None or members == self.moving(t):
            return forces
        return forces[self._places(t, members)[1]]

    def _places(self, t: int, members: list[int]) -> tuple[list[int], Tensor]:
        """Where these structures, and their atoms, stand among those that took frame t."""
        moving = self.moving(t)
        rows = [moving.index(k) for k in members]
        return rows, self.start.select(moving).atoms_of(rows)

    def _placed(self, t: int) -> Kept:
        like, kept = self.start.positions, self.frames[t]
        if kept is None:
            raise RuntimeError(f"The state before frame {t} of this relaxation was not stored.")
        positions, state = kept
        return positions.to(like), state.map(lambda s: s.to(like) if s.is_floating_point() else s.to(like.device))

    @torch.no_grad()
    def _run_again(self, first: int) -> None:
        """Find the states of the frames from the stored one `first` to the next stored one."""
        positions, state = self._placed(first)
        now = self.moving(first)
        structures, neighbors = self.start.select(now).replace(positions=positions), self.map.neighbor_list()
        self._again = {}
        for t in range(first + 1, min(first + self.kept.every, len(self.frames))):
            _, forces = self.map.potential.energy_and_forces(structures, neighbors(structures))
            structures, state = self.map.advance(structures, state, forces)
            stay = [now.index(k) for k in self.moving(t)]
            if len(stay) < len(now):
                state = state.select(structures.atoms_of(stay), torch.tensor(stay, device=positions.device))
                structures, now = structures.select(stay), self.moving(t)
            self._again[t] = (structures.positions, state)

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


Versions = tuple[tuple[int, int], ...]


class Weights:
    """The parameters of some modules, found once: to walk through a module costs as much as the energy of a small cell.

    A parameter that is changed in place or replaced is noticed; a module that is put in later, or a
    parameter of TorchScript's that is replaced, is not.
    """

    def __init__(self, *modules: nn.Module):
        self.modules = modules
        self._find()

    def _find(self) -> None:
        self._slots: list[tuple[Mapping[str, Tensor | None], str]] = []
        for module in (part for whole in self.modules for part in whole.modules()):
            held: Mapping[str, Tensor | None] = module._parameters
            if isinstance(module, torch.jit.ScriptModule):  # holds no dictionary
                held = dict(module.named_parameters(recurse=False))
            self._slots += [(held, name) for name in held]

    def versions(self) -> Versions:
        """Changes whenever a weight is changed in place or replaced."""
        # A weight that was given a low-rank update lies elsewhere since, beside the update's numbers.
        if not all(name in held for held, name in self._slots):
            self._find()
        found = (held.get(name) for held, name in self._slots)
        return tuple((p.data_ptr(), p._version) for p in found if p is not None)
