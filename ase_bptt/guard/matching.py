"""Structures with energies and forces that a potential shall give, and how far it is from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from torch import Tensor
from torch.nn.functional import huber_loss

from ..neighbors import find_pairs
from ..potential import Potential
from ..singlepoint import single_points
from ..structures import Structures

FORCE, ENERGY = 0.1, 0.05
"""eV/Å and eV an atom: a deviation of this size costs 1/2, smaller ones go by their square, larger ones linearly."""
SOUND = 30.0
"""eV/Å: where a potential finds a larger force, it was asked for what it does not know."""


@dataclass(eq=False)
class Points:
    """Structures and what a potential shall give there.

    Attributes
    ----------
    structures : Structures, n of them
    energies : Tensor, shape (n,)
        In eV.
    forces : Tensor, shape (n_atoms, 3)
        In eV/Å, before constraints.
    """

    structures: Structures
    energies: Tensor
    forces: Tensor

    @classmethod
    def of(cls, potential: Potential, atoms: Sequence[Atoms]) -> Points:
        """What this potential gives for these structures as it is now."""
        structures = potential.batch(atoms)
        _, *found = zip(*single_points(potential, atoms), strict=True)
        energies, forces = (torch.cat(column) for column in found)
        return cls(structures, energies, forces)

    def __len__(self) -> int:
        return len(self.structures)

    def sound(self) -> list[int]:
        """Which of them have a finite energy, and no force above `SOUND`."""
        largest = self.structures.max(self.forces.norm(dim=1).nan_to_num(nan=torch.inf))
        return (torch.isfinite(self.energies) & (largest < SOUND)).nonzero().squeeze(1).tolist()

    def select(self, keep: Sequence[int]) -> Points:
        """Those with these indices, in this order."""
        index = torch.as_tensor(list(keep), dtype=torch.int64, device=self.energies.device)
        return Points(self.structures.select(keep), self.energies[index], self.forces[self.structures.atoms_of(keep)])

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state` makes the same of; constraints are not among them."""
        names = ("positions", "cells", "pbc", "numbers", "masses")
        tensors = {name: getattr(self.structures, name).detach().cpu() for name in names}
        labels = {"energies": self.energies.cpu(), "forces": self.forces.cpu()}
        return {**tensors, **labels, "counts": list(self.structures.counts)}

    @classmethod
    def from_state(cls, state: dict[str, Any], potential: Potential) -> Points:
        """What `state` gave, where and in the dtype this potential computes."""
        tensors = {name: value for name, value in state.items() if name not in ("counts", "energies", "forces")}
        counts = tuple(state["counts"])
        structures = Structures(**tensors, counts=counts, constraints=((),) * len(counts))
        structures = structures.to(potential.device, potential.dtype)
        return cls(structures, *(state[name].to(structures.positions) for name in ("energies", "forces")))


def answer(potential: Potential, structures: Structures) -> tuple[Tensor, Tensor]:
    """Energies and forces as the potential gives them now, with a graph."""
    return potential.energy_and_forces(structures, find_pairs(structures, potential.cutoff), create_graph=True)


def cost(points: Points, energy: Tensor, forces: Tensor, *, energies: bool = True) -> Tensor:
    """What deviations of energies (n,) in eV and forces (n_atoms, 3) in eV/Å cost, without a unit.

    The mean over the components of the forces of Huber's function of their deviation in units of
    `FORCE`, and likewise that over the structures of the deviation of the energy per atom in units of
    `ENERGY`. Forces are compared as the constraints let them act; held atoms do not count.
    """
    structures = points.structures
    off = structures.project_forces(forces - points.forces) / FORCE
    moving = (3 * structures.movable.sum()).clamp(min=1)
    found = huber_loss(off, torch.zeros_like(off), reduction="sum") / moving
    if energies:
        sizes = torch.tensor(structures.counts, device=energy.device)
        off = (energy - points.energies) / sizes / ENERGY
        found = found + huber_loss(off, torch.zeros_like(off))
    return found
