"""A small network that predicts forces directly: the template for potentials that are not conservative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..tuning import staged

ELEMENTS = 119
"""Rows of the table of elements, by atomic number."""


class Direct(Potential):
    """Message passing with one head for the energy and another for the forces.

    Forces are sums of learned scalars times unit vectors to the neighbours, so they turn with the
    structure; the scalar of a pair is the same from both of its ends, so they sum to zero. They
    are no slope of the energy: there is no stress, and energy is not conserved along a trajectory.

    Its weights are random, drawn with ``seed``: it is here to be trained, to try things out with,
    and to be copied. What an own direct-force potential needs is what is here: `conservative` is
    False, and `energy_and_forces` is overridden, with a graph from positions and weights to the
    forces where ``create_graph`` asks for one.

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.elements = nn.Embedding(ELEMENTS, width)
            self.filters = nn.ModuleList(nn.Linear(basis, width, bias=False) for _ in range(layers))
            self.updates = nn.ModuleList(_two_layers(width, width) for _ in range(layers))
            self.energy_head = _two_layers(width, 1)
            self.force_head = _two_layers(width + basis, 1)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        """Energies alone; nothing here asks for their slope."""
        _, distances = _geometry(structures, edges)
        return self._energy(structures, self._atoms(structures, edges, self._basis(distances)))

    def energy_and_forces(
        self, structures: Structures, edges: Edges, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(create_graph):
            directions, distances = _geometry(structures, edges)
            basis = self._basis(distances)
            atoms = self._atoms(structures, edges, basis)
            # What both ends of a pair know, in either order: the pull on one is the pull on the other.
            both = torch.cat([atoms[edges.i] + atoms[edges.j], basis], dim=1)
            pulls = self.force_head(both) * self._fade(distances)[:, None] * directions
            forces = torch.zeros_like(structures.positions).index_add(0, edges.i, pulls)
            return self._energy(structures, atoms).energy, forces

    def _atoms(self, structures: Structures, edges: Edges, basis: Tensor) -> Tensor:
        """What each atom knows of itself and its surroundings, shape (n_atoms, width)."""
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
        """1 at no distance, 0 from the cutoff on, without slope there."""
        return (1 - (distances / self.cutoff).clamp(max=1) ** 2) ** 3

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        return staged(
            self, before=("elements.",), stacks=("filters.", "updates."), after=("energy_head.", "force_head.")
        )

    @classmethod
    def from_name(cls, variant: str | None) -> Direct:
        if variant is not None:
            raise ValueError(f"The family 'direct' has no variant {variant!r}; build Direct(...) in Python.")
        return cls()

    def config(self) -> dict[str, Any]:
        return {"cutoff": self.cutoff, **self.settings}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Direct:
        return cls(**config)


def _geometry(structures: Structures, edges: Edges) -> tuple[Tensor, Tensor]:
    """Unit vectors to the neighbours, shape (n_edges, 3), and distances in Å, shape (n_edges,)."""
    vectors = edges.vectors(structures)
    distances = vectors.square().sum(1).sqrt()
    return vectors / distances[:, None], distances


def _two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out))
