"""A small network that predicts forces directly: the template for potentials that are not conservative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Prediction
from ..structures import Structures
from ..threads import Building
from ..tuning import staged
from .analytic import Parametrised

ELEMENTS = 119
"""Rows of the table of elements, by atomic number."""


class Direct(Parametrised):
    """Message passing with one head for the energy and another for the forces.

    Forces are sums of learned scalars times unit vectors to the neighbours, so they turn with the
    structure; the scalars of an edge and its reverse are equal, so that the forces sum to zero. They are
    not the gradient of an energy: there is no stress, and energy is not conserved along a trajectory.

    Its weights are random, drawn with ``seed``: it is here to be trained, for experiments, and to be
    copied. A direct-force potential of your own needs what is here: `conservative` is False, and
    `energy_and_forces` is overridden, with a graph from positions and weights to the forces where
    ``create_graph`` is True.

    Parameters
    ----------
    cutoff : float
        In Å.
    width : int
        Numbers that an atom carries.
    layers : int
        Rounds of message passing.
    basis : int
        Functions of the distance.
    seed : int
        Of the weights.
    """

    family = "direct"
    conservative = False

    def __init__(self, cutoff: float = 5.0, width: int = 16, layers: int = 2, basis: int = 8, seed: int = 0):
        super().__init__()
        self.cutoff = float(cutoff)
        self.settings = {"width": int(width), "layers": int(layers), "basis": int(basis), "seed": int(seed)}
        with Building(seed=seed):
            self.elements = nn.Embedding(ELEMENTS, width)
            self.filters = nn.ModuleList(nn.Linear(basis, width, bias=False) for _ in range(layers))
            self.updates = nn.ModuleList(_two_layers(width, width) for _ in range(layers))
            self.energy_head = _two_layers(width, 1)
            self.force_head = _two_layers(width + basis, 1)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        """Energies alone, which nothing here differentiates."""
        _, distances = _geometry(structures, edges)
        return self._energy(structures, self._atoms(structures, edges, self._basis(distances)))

    def energy_and_forces(
        self, structures: Structures, edges: Edges, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(create_graph):
            directions, distances = _geometry(structures, edges)
            basis = self._basis(distances)
            atoms = self._atoms(structures, edges, basis)
            # Symmetric in the two atoms of an edge, so that the forces on them are opposite.
            both = torch.cat([atoms[edges.i] + atoms[edges.j], basis], dim=1)
            pulls = self.force_head(both) * self._fade(distances)[:, None] * directions
            forces = torch.zeros_like(structures.positions).index_add(0, edges.i, pulls)
            return self._energy(structures, atoms).energy, forces

    def _atoms(self, structures: Structures, edges: Edges, basis: Tensor) -> Tensor:
        """Features of each atom and its neighbourhood, shape (n_atoms, width)."""
        atoms = self.elements(structures.numbers)
        for filters, update in zip(self.filters, self.updates, strict=True):
            messages = torch.zeros_like(atoms).index_add(0, edges.i, filters(basis) * atoms[edges.j])
            atoms = atoms + update(messages)
        return atoms

    def _energy(self, structures: Structures, atoms: Tensor) -> Prediction:
        atomic = self.energy_head(atoms).squeeze(1)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _basis(self, distances: Tensor) -> Tensor:
        """Sines that fade out at the cutoff, shape (n_edges, basis)."""
        orders = torch.arange(1, self.settings["basis"] + 1, device=distances.device).to(distances)
        waves = torch.sin(math.pi * orders * distances[:, None] / self.cutoff) / distances[:, None]
        return waves * self._fade(distances)[:, None]

    def _fade(self, distances: Tensor) -> Tensor:
        """1 at distance zero, 0 from the cutoff on, where its derivative vanishes, too."""
        return (1 - (distances / self.cutoff).clamp(max=1) ** 2) ** 3

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        return staged(
            self, before=("elements.",), stacks=("filters.", "updates."), after=("energy_head.", "force_head.")
        )

    def config(self) -> dict[str, Any]:
        return {"cutoff": self.cutoff, **self.settings}


def _geometry(structures: Structures, edges: Edges) -> tuple[Tensor, Tensor]:
    """Unit vectors to the neighbours, shape (n_edges, 3), and distances in Å, shape (n_edges,)."""
    vectors = edges.vectors(structures)
    distances = vectors.square().sum(1).sqrt()
    return vectors / distances[:, None], distances


def _two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out))
