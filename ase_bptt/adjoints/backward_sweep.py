"""The adjoint equations of the frames, last to first, each recomputed from its kept state.

The product of a vector with the Jacobian of a frame (`frame_vjp`) comes from second derivatives, or from differences
of gradients of the energy (`force_vjp`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..iterated_map import IteratedMap, Kept, Trajectory
from ..neighbors import Edges
from ..potential import Potential
from ..steppers import State
from ..structures import Structures
from ..utils import added, vjp


class Frames:
    """The state before each frame of a trajectory; those in between checkpoints are recomputed.

    Attributes
    ----------
    trajectory : Trajectory
    recomputed : dict
        The states between two checkpoints, by frame; only the latest such stretch is in memory.
    """

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory
        self.recomputed: dict[int, Kept] = {}

    def before(self, t: int, members: list[int] | None = None) -> Kept:
        """Positions and stepper state before frame t, of all structures that took it, or of these among them."""
        trajectory = self.trajectory
        found = trajectory.kept(t)
        if found is None and t not in self.recomputed:
            self._recompute(t)
        positions, state = self.recomputed[t] if found is None else found
        if members is None or members == trajectory.moving(t):
            return positions, state
        rows, atoms = trajectory.places(t, members)
        return positions[atoms], state.select(atoms, torch.tensor(rows, device=positions.device))

    @torch.no_grad()
    def _recompute(self, t: int) -> None:
        """Find the states of the frames between two kept ones, with frame t among them."""
        trajectory, iterated = self.trajectory, self.trajectory.map
        every = trajectory.checkpointing.every if trajectory.checkpointing else 1
        first = t - t % every
        kept = trajectory.kept(first)
        if kept is None:
            raise RuntimeError(f"The state before frame {first} of this relaxation was not kept.")
        (positions, state), now = kept, trajectory.moving(first)
        structures, neighbors = trajectory.start.select(now).replace(positions=positions), iterated.neighbor_list()
        self.recomputed = {}
        for t in range(first + 1, min(first + every, len(trajectory.frames))):
            _, forces = iterated.potential.energy_and_forces(structures, neighbors(structures))
            structures, state = iterated.advance(structures, state, forces)
            stay = [now.index(k) for k in trajectory.moving(t)]
            if len(stay) < len(now):
                state = state.select(structures.atoms_of(stay), torch.tensor(stay, device=positions.device))
                structures, now = structures.select(stay), trajectory.moving(t)
            self.recomputed[t] = (structures.positions, state)


class BackwardSweep:
    """From dL/dX(T) to dL/dX(0), adding up dL/dconditions (cells, pressures) and dL/dweights frame by frame.

    A structure that had stopped before frame t passes its adjoint through unchanged.

    Parameters
    ----------
    trajectory : Trajectory
    gradient : Tensor, shape (n_atoms, 3)
        dL/dX(T).
    weights : list of Tensor
    conditions : sequence of bool
        Which of the start's conditions a gradient is wanted for.
    clip, differences
        As for `Replay`.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        gradient: Tensor,
        weights: list[Tensor],
        conditions: Sequence[bool],
        clip: float | None = None,
        differences: bool = False,
    ):
        self.trajectory, self.weights, self.clip, self.differences = trajectory, weights, clip, differences
        self.adjoint = gradient.clone()
        self.to_weights: list[Tensor | None] = [None] * len(weights)
        of_start = zip(trajectory.start.conditions(), conditions, strict=True)
        self.to_conditions = [torch.zeros_like(value) if wanted else None for value, wanted in of_start]
        self.neighbors = trajectory.map.neighbor_list()
        self.frames = Frames(trajectory)
        self.norms = [self._norm()]

    def run(self, window: int | None) -> None:
        """All frames, or the last ones of each structure."""
        nsteps, start = self.trajectory.nsteps, self.trajectory.start
        first = [0 if window is None else max(0, n - window) for n in nsteps]
        state_adjoint: State | None = None
        members: list[int] = []
        for t in reversed(range(min(first, default=0), max(nsteps, default=0))):
            now = [k for k in self.trajectory.moving(t) if t >= first[k]]
            # Between the windows of two structures there may be frames of neither.
            state_adjoint = self._through(t, now, members, state_adjoint) if now else None
            members = now
            self.norms.append(self._norm())
        if min(first, default=0) == 0:
            self._through_the_start(state_adjoint, members)
        # What lies before a window is taken as given.
        self.adjoint[start.atoms_of([k for k, t in enumerate(first) if t > 0])] = 0
        self.trajectory.adjoint_norms = self._norms_since(first)

    def _through(self, t: int, now: list[int], before: list[int], state_adjoint: State | None) -> State:
        """Frame t of the structures `now`, where `before` took part in the frame after it."""
        start, iterated = self.trajectory.start, self.trajectory.map
        positions, state = self.frames.before(t, now)
        # Those that stopped after frame t enter with a state that nothing depends on.
        state_adjoint = _matched(state_adjoint, state, before, now, start.counts)
        atoms, members, x = start.atoms_of(now), start.select(now), positions.clone().requires_grad_()
        carried = [s.clone().requires_grad_() for s in state.floats()]
        of_members = zip(members.conditions(), self.to_conditions, strict=True)
        conditions = [value.detach().requires_grad_(to is not None) for value, to in of_members]
        gradients = (self.adjoint[atoms], *state_adjoint.floats())
        inputs = [x, *carried, *(value for value in conditions if value.requires_grad), *self.weights]
        structures, state = members.replace(positions=x).under(conditions), state.with_floats(carried)
        if self.differences:
            forces = self.trajectory.forces_before(t, now)
            back = frame_vjp(iterated, structures, state, self.neighbors(structures), forces, gradients, inputs)
        else:
            with torch.enable_grad():
                ends = iterated.frame(structures, state, self.neighbors)
            back = vjp((ends[0], *ends[1].floats()), gradients, inputs)
        to_x, *rest = back
        to_state = [_or_zero(g, s) for g, s in zip(rest[: len(carried)], carried, strict=True)]
        rest = rest[len(carried) :]
        self.adjoint[atoms] = _or_zero(to_x, x)
        for value, to in zip(conditions, self.to_conditions, strict=True):
            if to is not None:
                to[now] += _or_zero(rest.pop(0), value)
        self._add(rest)
        return self._clipped(state.with_floats(to_state), now)

    def _through_the_start(self, state_adjoint: State | None, members: list[int]) -> None:
        """The first state may depend on the stepper's own parameters."""
        trajectory = self.trajectory
        learnt = any(p.requires_grad for p in trajectory.map.stepper.parameters())
        if state_adjoint is None or not learnt:
            return
        with torch.enable_grad():
            state = trajectory.map.start(trajectory.start.select(members))
        self._add(vjp(state.floats(), state_adjoint.floats(), self.weights))

    def _add(self, gradients: list[Tensor | None]) -> None:
        self.to_weights = added(self.to_weights, gradients)

    def _norm(self) -> Tensor:
        return self.trajectory.start.sum(self.adjoint.square()).sum(1).sqrt()

    def _norms_since(self, first: list[int]) -> Tensor:
        """One row a frame and one for the end, with zeros before each structure's first frame."""
        norms = torch.stack(self.norms[::-1])
        norms = torch.cat((norms.new_zeros(min(first, default=0), norms.shape[1]), norms))
        frames = torch.arange(len(norms), device=norms.device)
        return torch.where(frames[:, None] >= torch.tensor(first, device=norms.device), norms, 0.0)

    def _clipped(self, state_adjoint: State, now: list[int]) -> State:
        if self.clip is None:
            return state_adjoint
        norm, start = self._norm(), self.trajectory.start
        most = self.clip * self.norms[0]
        factor = torch.where(norm > most, most / torch.where(norm > 0, norm, 1.0), 1.0)
        self.adjoint *= factor[start.batch, None]
        own = factor[now]
        per_atom = own[start.select(now).batch]
        return State(
            {k: v * per_atom.view(-1, *[1] * (v.dim() - 1)) for k, v in state_adjoint.atoms.items()},
            {k: v * own if v.is_floating_point() else v for k, v in state_adjoint.structures.items()},
            state_adjoint.lists,
        )


def _matched(old: State | None, like: State, before: list[int], now: list[int], counts: tuple[int, ...]) -> State:
    """The state's adjoint of the structures `now`: zero, but for those that took part before."""
    if old is not None and before == now:
        return old
    new = like.map(torch.zeros_like)
    if old is None:
        return new
    both = [k for k in now if k in before]
    to, of = [now.index(k) for k in both], [before.index(k) for k in both]
    to_atoms, of_atoms = _atoms(both, now, counts), _atoms(both, before, counts)
    for name, value in old.atoms.items():
        new.atoms[name][to_atoms] = value[of_atoms]
    for name, value in old.structures.items():
        new.structures[name][to] = value[of]
    for name, values in old.lists.items():
        listed = dict(zip(before, values, strict=True))
        new.lists[name] = tuple(listed.get(k, zero) for k, zero in zip(now, new.lists[name], strict=True))
    return new


def _atoms(wanted: list[int], members: list[int], counts: tuple[int, ...]) -> list[int]:
    """Rows of these structures' atoms in a batch of the structures `members`."""
    firsts = {}
    total = 0
    for k in members:
        firsts[k] = total
        total += counts[k]
    return [row for k in wanted for row in range(firsts[k], firsts[k] + counts[k])]


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


AWAY = 1e-5
"""Å by which the atom that moves farthest is moved, ahead and behind: rounding and curvature err alike there."""


def check_smooth(potential: Potential) -> None:
    """Raise for a potential of which no differences can be taken."""
    if not potential.conservative:
        raise NotImplementedError(
            f"The forces of this {potential.family} potential are not the negative gradient of an energy, so that "
            "there are no differences of it: take Replay() without them."
        )
    if potential.dtype is not torch.float64:
        raise ValueError(
            "Differences of energies need float64: give load_potential the dtype, or take Replay() without them."
        )


def frame_vjp(
    iterated: IteratedMap,
    structures: Structures,
    state: State,
    edges: Edges,
    forces: Tensor | None,
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """From the gradients by a frame's positions and state to those by the inputs.

    The step is differentiated exactly, and gives dL/dF; what the forces add is `force_vjp`.

    Parameters
    ----------
    iterated : IteratedMap
    structures, state
        Before the frame; those that the gradient is wanted by are among the inputs.
    edges : Edges
    forces : Tensor or None, shape (n_atoms, 3)
        By which the frame was taken; None computes them again.
    gradients : sequence of Tensor
        By the positions and the floats of the state after the frame.
    inputs : sequence of Tensor
        Leaves: the positions first.
    """
    potential = iterated.potential
    if forces is None:
        _, forces = potential.energy_and_forces(structures, edges)
    forces = forces.detach().requires_grad_()
    with torch.enable_grad():
        after, new = iterated.advance(structures, state, forces)
    *direct, to_forces = vjp((after.positions, *new.floats()), gradients, [*inputs, forces])
    if to_forces is None:
        return direct
    by_forces = force_vjp(potential, structures, edges, to_forces, inputs)
    return added(direct, by_forces)


def force_vjp(
    potential: Potential, structures: Structures, edges: Edges, vector: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """vector . dF/d(input) for each input, with F = -dE/dX: by central differences of dE/d(input) along the vector.

    Since vector . F is the derivative of -E along the vector, its derivatives are differences of those of E. Each
    structure is moved by a length of its own, and divided by it, in one evaluation for all.
    """
    longest = structures.max(vector.square().sum(1)).sqrt()
    moved = torch.where(longest > 0, AWAY / torch.where(longest > 0, longest, 1.0), 0.0)
    weight = torch.where(longest > 0, -0.5 / torch.where(longest > 0, moved, 1.0), 0.0)
    found: list[Tensor | None] = [None] * len(inputs)
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            there = structures.positions + sign * moved[structures.batch, None] * vector
            energy = potential.energies(structures.replace(positions=there), edges)
            part = vjp([(sign * weight * energy).sum()], [torch.ones_like(energy[0])], inputs)
        found = added(found, part)
    return found
