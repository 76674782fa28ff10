"""Through a frame without second derivatives: slopes of the forces from first derivatives of the energy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..frames import IteratedMap
from ..gradients import added, pull_back
from ..neighbors import Pairs
from ..potential import Potential
from ..steppers import State
from ..structures import Structures

AWAY = 1e-5
"""Å by which the atom that moves farthest is moved, ahead and behind: rounding and curvature err alike there."""


def check_smooth(potential: Potential) -> None:
    """Raise for a potential of which no differences can be taken."""
    if not potential.conservative:
        raise NotImplementedError(
            f"The forces of this {potential.family} potential are not the slope of an energy, so that there are no "
            "differences of it: take Replay() without them."
        )
    if potential.dtype is not torch.float64:
        raise ValueError(
            "Differences of energies need float64: give load_potential the dtype, or take Replay() without them."
        )


def through_frame(
    iterated: IteratedMap,
    structures: Structures,
    state: State,
    pairs: Pairs,
    forces: Tensor | None,
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """From the gradients by a frame's positions and state to those by the inputs.

    The step is differentiated exactly, and gives dL/dF; what the forces add is `slopes`.

    Parameters
    ----------
    iterated : IteratedMap
    structures, state
        Before the frame; those that the gradient is wanted by are among the inputs.
    pairs : Pairs
    forces : Tensor or None, shape (n_atoms, 3)
        By which the frame was taken; None computes them again.
    gradients : sequence of Tensor
        By the positions and the floats of the state after the frame.
    inputs : sequence of Tensor
        Leaves: the positions first.
    """
    potential = iterated.potential
    if forces is None:
        _, forces = potential.energy_and_forces(structures, pairs)
    forces = forces.detach().requires_grad_()
    with torch.enable_grad():
        after, new = iterated.advance(structures, state, forces)
    *direct, to_forces = pull_back((after.positions, *new.floats()), gradients, [*inputs, forces])
    if to_forces is None:
        return direct
    bent = slopes(potential, structures, pairs, to_forces, inputs)
    return added(direct, bent)


def slopes(
    potential: Potential, structures: Structures, pairs: Pairs, vector: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """vector . dF/d(input) for each input, with F = -dE/dX: by central differences of dE/d(input) along the vector.

    Since vector . F is the slope of -E along the vector, its own slopes are those of E at two places, apart. Each
    structure is moved by a length of its own, and divided by it, in one evaluation for all.
    """
    longest = structures.max(vector.square().sum(1)).sqrt()
    moved = torch.where(longest > 0, AWAY / torch.where(longest > 0, longest, 1.0), 0.0)
    weight = torch.where(longest > 0, -0.5 / torch.where(longest > 0, moved, 1.0), 0.0)
    found: list[Tensor | None] = [None] * len(inputs)
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            there = structures.positions + sign * moved[structures.batch, None] * vector
            energy = potential(structures.replace(positions=there), pairs).energy
            part = pull_back([(sign * weight * energy).sum()], [torch.ones_like(energy[0])], inputs)
        found = added(found, part)
    return found
