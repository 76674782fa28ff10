"""Energies and forces of many structures where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ase import Atoms
from torch import Tensor

from .neighbors import NeighborList
from .planning import in_parts
from .potential import Potential
from .structures import Structures

TOGETHER = 16
"""Structures in one batch."""


def single_points(
    potential: Potential, atoms: Sequence[Atoms], size: int = TOGETHER
) -> Iterator[tuple[Structures, Tensor, Tensor]]:
    """Each batch of so many structures, its energies (n,) in eV and its forces (n_atoms, 3) in eV/Å, detached.

    Where memory runs out a batch is halved.
    """

    def run(some: Sequence[Atoms]) -> tuple[Structures, Tensor, Tensor]:
        batch = potential.batch(some)
        return batch, *potential.energy_and_forces(batch, NeighborList(potential.cutoff, skin=0.0)(batch))

    for first in range(0, len(atoms), size):
        for _, found in in_parts(run, atoms[first : first + size]):
            yield found
