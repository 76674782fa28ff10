"""NequIP: equivariant message passing (Batzner et al., Nat. Commun. 13, 2453 (2022))."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..threads import view
from ..tuning import staged
from .faster_layers import Rows, convolution, each, of_lengths, one_way_first
from .nequip_files import EXTENSION, Saved, build, from_checkpoint, from_package, is_package, loaded, tell_dtype
from .nequip_files import write_package as write

PROVIDED = frozenset({"pos", "edge_vectors", "edge_index", "atom_types", "batch", "num_atoms"})
"""What nequip calls what its models are given here."""
IMPLIED = frozenset({"cell", "edge_cell_shift"})
"""Inputs that the vectors of the edges stand for."""
OF_OTHERS = frozenset({"edge_transpose_perm", "lmp_mliap_data", "num_local_ghost_atoms"})
"""Inputs that only some of nequip's programs have."""


class NequIP(Potential):
    """A GraphModel of nequip, seen as a Potential.

    Edges, live positions and live cells are ours; nequip's own layer for forces is left out. The module is used as it
    is, neither copied nor compiled.

    Parameters
    ----------
    model : nequip.nn.GraphModel
    settings : dict or None
        The configuration that nequip builds it from, as its files hold it; without, the potential computes, but
        cannot be saved.

    Raises
    ------
    ValueError
        For types of atoms that are no chemical elements.
    NotImplementedError
        For a model with inputs that structures do not have.
    """

    family = "nequip"
    extra = "nequip"
    installation = 'for NequIP, which is not to be beside MACE, by pip install "ase_bptt[nequip]"'
    native_name = f"nequip{EXTENSION}"
    atomic_properties = ("energies",)
    foreign_keywords = MappingProxyType({
        "compile_path": "give the .nequip.zip or .ckpt file from which it was compiled as potential, with trust=True",
        "energy_units_to_eV": "energies are in eV here, and so must be those of the model",
        "length_units_to_A": "lengths are in Å here, and so must be those of the model",
        "transforms": "leave it out: neighbours and types of atoms are found here",
        "chemical_species_to_atom_type_map": "leave it out: the types of atoms must be chemical elements",
    })  # fmt: skip

    model: Any
    _types: Tensor

    def __init__(self, model: Any, settings: dict[str, Any] | None = None):
        super().__init__()
        self.model = model.eval()
        self.settings = settings
        self.cutoff = float(model.metadata["r_max"])
        names = list(model.type_names)
        if unknown := [name for name in names if name not in atomic_numbers]:
            raise ValueError(
                f"The types of atoms of a NequIP model must be chemical elements, and {unknown[0]!r} is none: "
                "train one whose types are."
            )
        if further := set(model.model_input_fields) - PROVIDED - IMPLIED - OF_OTHERS:
            raise NotImplementedError(
                f"This NequIP model has an input that structures do not have here: {', '.join(sorted(further))}."
            )
        numbers = torch.tensor([atomic_numbers[name] for name in names])
        self.atomic_numbers = frozenset(numbers.tolist())
        types = torch.zeros(int(numbers.max()) + 1, dtype=torch.int64)
        types[numbers] = torch.arange(len(names))
        self.register_buffer("_types", types.to(next(model.buffers()).device), persistent=False)
        mixed = self.dtype is torch.float32
        self.exact = {name for name, value in model.named_buffers() if mixed and value.dtype is torch.float64}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> NequIP:
        """Move and cast; the constants that nequip keeps in float64 beside weights in float32 stay in it."""
        exact = {name: value for name, value in self.model.named_buffers() if name in self.exact}
        super()._apply(function, recurse)
        for name, value in exact.items():
            owner, _, own = name.rpartition(".")
            module = self.model.get_submodule(owner)
            setattr(module, own, value.to(getattr(module, own).device))
        tell_dtype(self.model, self.dtype)
        return self

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        edges, paired = one_way_first(edges, structures)
        data = {
            "pos": structures.positions,
            "edge_vectors": edges.vectors(structures),
            "edge_index": torch.stack((edges.i, edges.j)),
            "atom_types": self._types[structures.numbers],
            "batch": structures.batch,
            "num_atoms": torch.tensor(structures.counts, device=structures.batch.device),
        }
        # TorchScript's optimised graphs round differently after some calls; see MACE.
        with torch.jit.optimized_execution(False), Rows():
            # In float64, whatever the dtype of the weights.
            atomic = self._energies(paired)(data)["atomic_energy"].squeeze(1)
        dtype = structures.positions.dtype
        return Prediction(structures.sum(atomic).to(dtype), atomic_energies=atomic.to(dtype))

    def _energies(self, paired: bool) -> Any:
        """The layers within nequip's own layer for forces, with our convolutions.

        Radial networks compute each distance once, if paired.
        """
        layers = each(getattr(self.model.model, "func", self.model.model), _convolved)
        # With cutoffs for each two types, an edge and its reverse may have different features.
        if not paired or any(getattr(layer, "_per_edge_type", False) for layer in layers):
            return layers
        return each(layers, _lengths_once)

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        inner = "model.model.func."
        return staged(
            self,
            before=(f"{inner}type_embed.", f"{inner}bessel_encode."),
            stacks=(f"{inner}layer",),
            after=(f"{inner}per_atom_energy_readout.", f"{inner}per_type_energy_scale_shift.scales"),
        )

    @classmethod
    def environment(cls) -> str:
        return "MACE needs e3nn 0.4.4, NequIP a newer one"

    @classmethod
    def from_name(cls, variant: str | None) -> Potential:
        raise ValueError(
            "A NequIP is loaded from its file: give the .nequip.zip or .ckpt file as potential, with trust "
            "(--potential FILE --trust in the shell)."
        )

    @classmethod
    def read_native(cls, path: Path) -> Saved | None:
        return from_package(path) if is_package(path) else None

    @classmethod
    def owns(cls, native: Any) -> bool:
        if isinstance(native, dict):
            return {"state_dict", "hyper_parameters"} <= native.keys() and "model" in native["hyper_parameters"]
        return isinstance(native, Saved) or hasattr(native, "is_graph_model")

    @classmethod
    def from_native(cls, native: Any) -> NequIP:
        if not isinstance(native, dict | Saved):
            return cls(native)
        saved = from_checkpoint(native) if isinstance(native, dict) else native
        return cls(loaded(saved), saved.settings)

    def config(self) -> dict[str, Any]:
        if self.settings is None:
            raise NotImplementedError(
                "A NequIP module does not know its configuration and cannot be saved: load it from its "
                ".nequip.zip or .ckpt file."
            )
        return dict(self.settings)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NequIP:
        return cls(build(config), config).to(torch.get_default_dtype())

    def save_native(self, path: Path) -> None:
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        write(Saved(self.config(), weights, dict(self.metadata)), path)


def _convolved(layer: Any) -> Any:
    """A layer, whose tensor product and sum, if it is a convolution with one of e3nn, are ours."""
    convolved = convolution(layer.conv.tp_scatter.tp) if hasattr(layer, "conv") else None
    if convolved is None:
        return layer

    def scattered(x: Tensor, edge_attr: Tensor, edge_weight: Tensor, edge_dst: Tensor, edge_src: Tensor) -> Tensor:
        return convolved(x, edge_attr, edge_weight, edge_src, edge_dst)

    return view(layer, conv=view(layer.conv, tp_scatter=scattered))


def _lengths_once(layer: Any) -> Any:
    """A layer, whose radial network, if it is a convolution, computes the length of an edge and of its reverse once."""
    if not hasattr(layer, "conv"):
        return layer
    return view(layer, conv=view(layer.conv, edge_mlp=of_lengths(layer.conv.edge_mlp)))
