"""Zero force at the reference: a loss that needs relaxed structures alone, and no relaxation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..cells.strained import Strained
from ..displacements import KNOWN, known_of
from ..losses import TINY
from ..pairs import RelaxationPair
from ..potential import Potential
from ..utils import check_positive, safe_sqrt
from .probes import energies_and_forces

STIFFNESS = 5.0
"""eV/Å^2: the force constant by which a force counts as the displacement that it would cause."""


def zero_force(potential: Potential, pairs: Sequence[RelaxationPair]) -> Tensor:
    """`root_delta_q` of the displacements that the forces at the references would cause, shape (n,), with a graph.

    Each free atom is displaced by F / k, with the force constant k = `STIFFNESS`, and a cell that moves by the same
    rule: its strain L is held as the length sqrt(n) (V/n)^(1/3) L, along which the curvature is about that of atoms,
    and counts with the mean mass of the atoms, as in the losses. Pressure is included. Where only the cell or the
    volume of a reference is known (its ``info["known"]``), that alone counts.

    Parameters
    ----------
    potential : Potential
    pairs : sequence of RelaxationPair, length n
        Only their relaxed structures count, and what of their cells is relaxed.

    Raises
    ------
    NotImplementedError
        For constraints that are not known where the cell moves, by name.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import RelaxationPair, load_potential
    >>> from ase_bptt.terms.zero_force import zero_force
    >>> crystals = [RelaxationPair(x, x, "Cu", cell="full") for x in (bulk("Cu", a=3.59), bulk("Cu", a=3.7))]
    >>> [round(loss, 2) for loss in zero_force(load_potential("emt"), crystals).tolist()]
    [0.02, 0.94]
    """
    structures = potential.batch([pair.relaxed for pair in pairs])
    freedoms = [
        replace(pair.freedom, hydrostatic=True) if known_of(pair.relaxed) == KNOWN[2] else pair.freedom
        for pair in pairs
    ]
    in_full = torch.tensor([known_of(pair.relaxed) == KNOWN[0] for pair in pairs], device=structures.pbc.device)
    masses = structures.masses * in_full[structures.batch]
    if any(freedom.moves for freedom in freedoms):
        mean = structures.sum(structures.masses) / structures.sum(torch.ones_like(masses))
        structures = Strained.of(structures, freedoms, balanced=True)
        atoms = structures.masses.index_copy(0, structures.atom_rows, masses)
        masses = atoms.index_copy(0, structures.cell_rows, mean[structures.moving].repeat_interleave(3))
    _, forces = energies_and_forces(potential, structures)
    displacements = structures.project_forces(forces) / STIFFNESS
    return (safe_sqrt(structures.sum(masses * displacements.square().sum(1))) + TINY).sqrt() - TINY**0.5


class ZeroForce:
    """`zero_force` at the references of each batch, as a term of the loss.

    Parameters
    ----------
    weight : float

    Examples
    --------
    >>> from ase_bptt import Trainer
    >>> from ase_bptt.terms.zero_force import ZeroForce
    >>> Trainer("emt", terms=[ZeroForce(0.1)]).terms[0].todict()
    {'name': 'zero_force', 'weight': 0.1}
    """

    name: ClassVar[str] = "zero_force"

    def __init__(self, weight: float = 1.0):
        check_positive(weight=weight)
        self.weight = weight

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Every pair has a reference, so nothing is refused."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Nothing is remembered."""

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """The mean of `zero_force` over a batch of pairs."""
        return zero_force(potential, pairs).mean()

    def state(self) -> dict[str, Any]:
        """Nothing, for a resumed run needs none."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def todict(self) -> dict[str, Any]:
        """Name and weight."""
        return {"name": self.name, "weight": self.weight}
