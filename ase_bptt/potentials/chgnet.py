"""CHGNet: charge-informed graph network (Deng et al., Nat. Mach. Intell. 5, 1031 (2023))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..neighbors import Edges
from ..neighbors.search import edge_codes, two_at_each_atom
from ..potential import Potential, Prediction
from ..structures import Structures
from ..suggestions import unknown_name
from ..threads import quiet, view
from ..tuning import staged
from . import require

VARIANTS = ("0.3.0", "0.2.0", "r2scan")


class CHGNet(Potential):
    """A module of chgnet, seen as a Potential.

    chgnet's converter makes float32 graphs of single structures in Python. Here the whole batch is
    one graph made of tensors, in the dtype of the weights, and no constant of chgnet is changed.

    Parameters
    ----------
    model : chgnet.model.CHGNet
        Used as it is, not copied.
    version : str or None
        Which pretrained model it began as; stored with it.
    """

    family = "chgnet"
    licence = "modified BSD, that of the package chgnet, which names none for the weights"
    extra = "chgnet"
    installation = 'for CHGNet by pip install "ase_bptt[chgnet]"'
    native_name = "chgnet.pth.tar"
    atomic_properties = ("energies", "magmoms")
    foreign_keywords = MappingProxyType({
        "check_cuda_mem": "choose the GPU by device='cuda:1'",
        "stress_weight": "stresses are in eV/Å^3 already",
        "return_site_energies": "leave it out and call atoms.get_potential_energies()",
    })  # fmt: skip

    model: Any

    def __init__(self, model: Any, version: str | None = None):
        super().__init__()
        self.model = model.eval()
        self.version = version
        self.cutoff = float(model.graph_converter.atom_graph_cutoff)
        self.bond_cutoff = float(model.graph_converter.bond_graph_cutoff)
        self.atomic_numbers = frozenset(range(1, 95))

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        graph = self._batched_graph(structures, edges)
        bent = structures.batch[graph.batched_bond_graph[:, 0]].unique().tolist()
        straight = sorted(set(range(len(structures))) - set(bent))
        if not (bent and straight):
            return self._predict(structures, graph)
        # Where a batch has no angle at all chgnet omits layers, which matters in 0.2.0: structures without angles are
        # computed apart.
        parts = []
        for members in (bent, straight):
            part = structures.select(members)
            parts.append(self._predict(part, self._batched_graph(part, _among(edges, structures, members))))
        back = torch.tensor([*bent, *straight], device=structures.batch.device).argsort()
        atoms_back = structures.atoms_of([*bent, *straight]).argsort()
        energy, atomic, magmoms = (torch.cat(c) for c in zip(*map(_tensors, parts), strict=True))
        return Prediction(energy[back], atomic_energies=atomic[atoms_back], magmoms=magmoms[atoms_back])

    def indices(self, structures: Structures, edges: Edges) -> list[Tensor] | None:
        """The legs of the angles; None where a structure has none, for which a forward of its own is run."""
        legs = list(_angles(edges, edges.vectors(structures).norm(dim=1), self.bond_cutoff, structures.n_atoms))
        bent = structures.batch.new_zeros(len(structures)).index_fill(0, structures.batch[edges.i[legs[0]]], 1)
        return legs if bent.all() else None

    def energies_from(self, structures: Structures, edges: Edges, indices: Sequence[Tensor]) -> Tensor:
        """Energies alone, from the legs of the angles, by tensors of which no value is looked at in Python."""
        # chgnet would count the atoms of each structure to divide by them.
        model = view(self.model)
        model.is_intensive = False
        first, second = indices
        energy = model._compute(self._batched_graph(structures, edges, (first, second)))["e"]
        return energy + structures.sum(self._references(structures))

    def _predict(self, structures: Structures, graph: Any) -> Prediction:
        out = self.model._compute(graph, compute_magmom=True, return_site_energies=True)
        sizes = torch.tensor(structures.counts, device=structures.positions.device)
        energy = out["e"] * sizes if self.model.is_intensive else out["e"]
        atomic = torch.cat(out["site_energies"])
        references = self._references(structures)
        energy, atomic = energy + structures.sum(references), atomic + references
        return Prediction(energy, atomic_energies=atomic, magmoms=torch.cat(out["m"]))

    def _references(self, structures: Structures) -> Tensor:
        """The energy of each atom that follows from its element, shape (n_atoms,)."""
        if self.model.composition_model is None:
            return structures.positions.new_zeros(structures.n_atoms)
        # A linear function of the composition.
        elements = structures.numbers.unsqueeze(1) == torch.arange(1, 95, device=structures.numbers.device)
        return self.model.composition_model.fc(elements.to(structures.positions)).squeeze(1)

    def _batched_graph(self, structures: Structures, edges: Edges, angles: tuple[Tensor, Tensor] | None = None) -> Any:
        module = require("chgnet.model.model", extra="chgnet")
        vectors = edges.vectors(structures)
        lengths = vectors.norm(dim=1)
        first, second = angles or _angles(edges, lengths, self.bond_cutoff, structures.n_atoms)
        topology = Topology.of(edges, structures.n_atoms)
        encoder = self.model.bond_basis_expansion
        bonds = lengths[topology.representative]
        directions = vectors / lengths[:, None]
        return module.BatchedGraph(
            atomic_numbers=structures.numbers,
            bond_bases_ag=encoder.rbf_expansion_ag(bonds),
            bond_bases_bg=encoder.rbf_expansion_bg(bonds),
            angle_bases=self._angle_bases(directions[first], directions[second]),
            batched_atom_graph=torch.stack((edges.i, edges.j), dim=1),
            batched_bond_graph=torch.stack(
                (edges.i[first], topology.undirected[first], topology.undirected[second]), dim=1
            ),
            atom_owners=structures.batch,
            directed2undirected=topology.undirected,
            atom_positions=[],
            strains=[],
            volumes=[],
        )

    def _angle_bases(self, first: Tensor, second: Tensor) -> Tensor:
        if len(first) == 0:
            return first.new_zeros(0)
        return self.model.angle_basis_expansion(first, second)

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        embeddings = ("atom_embedding.", "bond_", "angle_embedding.", "angle_basis_expansion.")
        return staged(
            self,
            before=tuple(f"model.{name}" for name in embeddings),
            stacks=("model.atom_conv_layers.", "model.bond_conv_layers.", "model.angle_layers."),
            after=("model.site_wise.", "model.readout_norm.", "model.mlp."),
        )

    @classmethod
    def from_name(cls, variant: str | None) -> CHGNet:
        """A pretrained model out of the chgnet wheel: 0.3.0 (default), 0.2.0 or r2scan."""
        version = variant or VARIANTS[0]
        if version not in VARIANTS:
            raise unknown_name("CHGNet", version, VARIANTS)
        chgnet = require("chgnet.model", extra=cls.extra).CHGNet
        with quiet():
            return cls(chgnet.load(model_name=version, use_device="cpu", verbose=False), version)

    @classmethod
    def owns(cls, native: Any) -> bool:
        if isinstance(native, dict):
            native = native.get("model")
            return isinstance(native, dict) and {"model_args", "state_dict"} <= native.keys()
        return type(native).__module__.startswith("chgnet.") and hasattr(native, "graph_converter")

    @classmethod
    def from_native(cls, native: Any) -> CHGNet:
        if isinstance(native, dict):
            chgnet = require("chgnet.model", extra="chgnet").CHGNet
            state = native["model"]["state_dict"]
            with quiet():
                native = chgnet.from_dict(native["model"])
            # chgnet builds float32 modules, which round the weights of a file in float64.
            native = native.to(next(t.dtype for t in state.values() if t.is_floating_point()))
            native.load_state_dict(state)
        return cls(native, getattr(native, "version", None))

    def config(self) -> dict[str, Any]:
        return {"version": self.version, "arguments": dict(self.model.model_args)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CHGNet:
        chgnet = require("chgnet.model", extra="chgnet").CHGNet
        with quiet():
            model = chgnet(**config["arguments"])
        return cls(model.to(torch.get_default_dtype()), config["version"])

    def save_native(self, path: Path) -> None:
        torch.save({"model": self.model.as_dict(), "metadata": dict(self.metadata)}, path)


def _tensors(found: Prediction) -> tuple[Any, ...]:
    return found.energy, found.atomic_energies, found.magmoms


def _among(edges: Edges, structures: Structures, members: list[int]) -> Edges:
    """The edges of these structures, as indices into the batch of them alone."""
    atoms = structures.atoms_of(members)
    place = torch.full_like(structures.batch, -1).index_copy(0, atoms, torch.arange(len(atoms), device=atoms.device))
    kept = place[edges.i] >= 0
    return Edges(place[edges.i[kept]], place[edges.j[kept]], edges.shifts[kept])


def _angles(edges: Edges, lengths: Tensor, cutoff: float, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Every ordered two short edges that share their atom i, each of shape (n_angles,)."""
    return two_at_each_atom(edges.i, lengths.detach() < cutoff, n_atoms)


@dataclass(eq=False)
class Topology:
    """Undirected bonds of directed edges.

    Attributes
    ----------
    undirected : Tensor, shape (n_edges,)
        The undirected bond of each edge.
    representative : Tensor, shape (n_bonds,)
        One edge of each undirected bond.
    """

    undirected: Tensor
    representative: Tensor

    @classmethod
    def of(cls, edges: Edges, n_atoms: int) -> Topology:
        order = edges.one_way_first
        if order is not None:
            bonds = torch.arange(order.shape[0] // 2, device=order.device)
            return cls(torch.empty_like(order).scatter(0, order, bonds.repeat(2)), order[: len(bonds)])
        i, j, shifts = edges.i, edges.j, edges.shifts.to(torch.int64)
        key = torch.minimum(edge_codes(i, j, shifts, n_atoms), edge_codes(j, i, -shifts, n_atoms))
        bonds, undirected = torch.unique(key, return_inverse=True)
        each = torch.arange(len(key), device=key.device)
        representative = each.new_zeros(len(bonds)).scatter_reduce(0, undirected, each, "amin", include_self=False)
        return cls(undirected, representative)
