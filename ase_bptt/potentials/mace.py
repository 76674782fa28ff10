"""MACE: higher-order equivariant message passing (Batatia et al., NeurIPS 2022, arXiv 2206.07697)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..threads import is_traced, view
from ..tuning import staged
from .faster_layers import Group, contraction, convolution
from .mace_files import LONG_RANGE, accelerated, build, describe, is_accelerated, load_foundation, plain, rightly_marked

SPECIFIED = {"total_charge": ("charge", "charges"), "total_spin": ("spin", "spins")}
"""What mace-torch calls the charge and the spin multiplicity of a structure, what users do, and its place here."""
Composition = tuple[dict[str, Tensor], list[Group]]
"""Inputs of a model that the positions do not change, and its atoms by elements; none where the call is traced."""
CUEQ = "cuequivariance"
E3NN = "0.4.4"
"""The release that mace-torch pins."""


class MACE(Potential):
    """A module of mace-torch, seen as a Potential.

    Parameters
    ----------
    model : mace.modules.MACE or ScaleShiftMACE
        Used as it is, not copied.
    head : str or None
        Which head of a multi-head model; None takes the one named "default", or the only one.
    cueq : bool
        Compute with cuEquivariance, in a converted copy of the model. A model that is converted already is
        taken as it is. What is saved is the plain form.

    Raises
    ------
    ValueError
        For an unknown head, with those that the model has.
    NotImplementedError
        For a model with electrostatics beyond its cutoff, or with inputs that structures do not have.
    ImportError
        For cueq where cuEquivariance is missing, with the extra that brings it.
    """

    family = "mace"
    licence = "each model has its own: MIT or the Academic Software License (the documentation has a list), or your own"
    extra = "mace"
    installation = 'for MACE by pip install "ase_bptt[mace]" (with cuEquivariance "ase_bptt[cueq]")'
    native_name = "mace.model"
    atomic_properties = ("energies",)
    foreign_keywords = MappingProxyType({
        "head": "the head is part of the name, potential='mace:NAME:HEAD'",
        "enable_cueq": "for a MACE give MACE(module, cueq=True) of ase_bptt.potentials.mace as the potential",
        "energy_units_to_eV": "the model's units are taken as eV",
        "length_units_to_A": "the model's units are taken as Å",
        "dispersion": "add it to the name, as potential='mace:medium+d3:pbe:bj'",
        "compile_mode": "nothing is compiled here, since a compiled model has no second derivatives",
    })  # fmt: skip

    model: Any
    _column: Tensor

    def __init__(self, model: Any, head: str | None = None, cueq: bool = False):
        super().__init__()
        if type(model).__name__ in LONG_RANGE:
            raise NotImplementedError(
                f"This model is of mace's class {type(model).__name__}, whose electrostatics reach beyond the cutoff, "
                "which is not supported: take one of class ScaleShiftMACE, such as mace:medium."
            )
        if cueq and not is_accelerated(model):
            model = accelerated(model)
        self.model = model.eval()
        self.cutoff = float(model.r_max)
        known = [int(z) for z in model.atomic_numbers]
        self.atomic_numbers = frozenset(known)
        self.head = _head_index(_heads(model), head)
        self._specified = _further_inputs(model)
        self.inputs = frozenset(SPECIFIED[name][0] for name in self._specified)
        column = torch.zeros(max(known) + 1, dtype=torch.int64, device=model.r_max.device)
        column[known] = torch.arange(len(known), device=column.device)
        self.register_buffer("_column", column, persistent=False)
        self._made: tuple[tuple, Composition] | None = None

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        positions = structures.positions
        # MACE switches gradients on for the tensor that it is given.
        if not positions.requires_grad:
            positions = positions.detach()
        edge_index, offsets, shifts = torch.stack((edges.i, edges.j)), edges.offsets(structures), edges.shifts
        order = edges.one_way_first
        if order is not None:
            edge_index, offsets, shifts = edge_index[:, order], offsets[order], shifts[order]
        composition, groups = self._composition(structures)
        data = {
            **composition,
            "positions": positions,
            "edge_index": edge_index,
            "shifts": offsets,
            "unit_shifts": shifts,
            "cell": structures.cells.reshape(-1, 3),
        }
        model = self.model if order is None else each_distance_once(self.model, order.shape[0])
        model = with_faster_layers(model, groups)
        # TorchScript optimises its graphs after some calls, and they then round differently: a resumed run
        # would not repeat an uninterrupted one bit for bit.
        with torch.jit.optimized_execution(False):
            out = model(data, training=True, compute_force=False)
        return Prediction(out["energy"], atomic_energies=out["node_energy"].to(positions))

    def _composition(self, structures: Structures) -> Composition:
        """What depends on elements, counts, charges and spins alone; kept, for all frames of a run share it."""
        made_for = (structures.numbers, structures.counts, structures.charges, structures.spins)
        known = self._made  # read once: other threads may put theirs there
        if known is None or any(a is not b for a, b in zip(known[0], made_for, strict=True)):
            places = torch.arange(len(self.atomic_numbers or ()), device=structures.batch.device)
            columns = self._column[structures.numbers]
            elements = columns.unsqueeze(1) == places
            present = [] if is_traced() else columns.unique().tolist()
            rows = [(columns == k).nonzero().squeeze(1) if len(present) > 1 else None for k in present]
            ends = structures.sum(torch.ones_like(structures.batch)).cumsum(0)
            made = {
                "node_attrs": elements.to(structures.positions),
                "batch": structures.batch,
                "ptr": nn.functional.pad(ends, (1, 0)),
                "head": torch.full_like(ends, self.head),
                **{name: getattr(structures, SPECIFIED[name][1]) for name in self._specified},
            }
            detached = {name: value.detach() for name, value in made.items()}
            self._made = known = made_for, (detached, list(zip(present, rows, strict=True)))
        return known[1]

    def check(self, structures: Structures) -> None:
        super().check(structures)
        for name, how in self._specified.items():
            if how["type"] != "categorical":
                continue
            word, place = SPECIFIED[name]
            least = -how.get("offset", 0)
            most = least + how["num_classes"] - 1
            for value in getattr(structures, place).tolist():
                if not (value == round(value) and least <= value <= most):
                    raise NotImplementedError(
                        f"This MACE model knows whole {place} from {least} to {most}, and info[{word!r}] is {value:g}: "
                        "take another model, or leave the structure out."
                    )

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        return staged(
            self,
            before=("model.node_embedding.",),
            stacks=("model.interactions.", "model.products.", "model.readouts."),
        )

    @classmethod
    def environment(cls) -> str:
        try:
            found = version("e3nn")
        except PackageNotFoundError:
            return ""
        return "" if found == E3NN else f"MACE needs e3nn {E3NN}, and families that are installed here {found}"

    @classmethod
    def from_name(cls, variant: str | None) -> MACE:
        """A foundation model by mace-torch's own name, and its head if it has several: mh-1:omat_pbe."""
        model, head = load_foundation(variant)
        return cls(model, head=head)

    @classmethod
    def owns(cls, native: Any) -> bool:
        return type(native).__module__.startswith("mace.") and hasattr(native, "r_max")

    @classmethod
    def from_native(cls, native: Any) -> MACE:
        metadata = getattr(native, "metadata", None)
        return cls(native, head=metadata.get("head") if isinstance(metadata, dict) else None)

    def as_stored(self) -> MACE:
        """Without cuEquivariance, so that what is written can be read where it is not installed."""
        return self._of(plain(self.model)) if self.form else self

    @property
    def form(self) -> str:
        return CUEQ if is_accelerated(self.model) else ""

    def in_form(self, form: str) -> MACE:
        return self._of(accelerated(self.model)) if form == CUEQ and not self.form else self

    def _of(self, model: Any) -> MACE:
        """The same potential on another form of its model."""
        made = MACE(model, head=_heads(self.model)[self.head])
        made.metadata = self.metadata
        return made

    def config(self) -> dict[str, Any]:
        return describe(self.model, self.head)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MACE:
        return cls(build(config), head=config.get("head"))

    def save_native(self, path: Path) -> None:
        heads = _heads(self.model)
        model = view(rightly_marked(self.model))
        model.metadata = dict(self.metadata) | ({"head": heads[self.head]} if len(heads) > 1 else {})
        torch.save(model, path)


def _heads(model: Any) -> list[str]:
    return list(getattr(model, "heads", None) or ["Default"])


def _head_index(heads: list[str], wanted: str | None) -> int:
    if wanted is None:
        wanted = heads[0] if len(heads) == 1 else "default"
    matches = [k for k, name in enumerate(heads) if name.lower() == wanted.lower()]
    if not matches:
        raise ValueError(
            f"This MACE model has the heads {', '.join(heads)}; {wanted!r} is none of them: choose one, as "
            "mace:NAME:HEAD or MACE(module, head=...)."
        )
    return matches[0]


def _further_inputs(model: Any) -> dict[str, Any]:
    """The inputs of the model for each structure beside its atoms, and how it takes them."""
    wanted = dict(getattr(model, "embedding_specs", None) or {})
    unknown = wanted.keys() - SPECIFIED.keys()
    if unknown:
        raise NotImplementedError(
            f"This MACE model needs {', '.join(sorted(unknown))} for each structure, which structures here do not "
            "have: take another."
        )
    return wanted


def with_faster_layers(model: Any, groups: Sequence[Group]) -> Any:
    """A view of a MACE whose tensor products along edges and symmetric contractions, where they are its own, are ours.

    The contractions stay where there are no groups.
    """
    layers, products = {}, {}
    for name, layer in model.interactions._modules.items():
        if (convolved := convolution(layer.conv_tp)) is not None:
            layers[name] = view(layer, conv_tp=lambda x, y, w, ends, of=convolved: of(x, y, w, *ends))
            layers[name].conv_fusion = True  # so that mace-torch leaves the sum to it
    for name, product in model.products._modules.items() if groups else ():
        own = product.symmetric_contractions
        if type(own).__name__ == "SymmetricContraction" and hasattr(own, "contractions"):
            contracted = partial(contraction, own.contractions, groups)
            products[name] = view(product, symmetric_contractions=lambda x, elements, of=contracted: of(x))
    changed = {"interactions": layers, "products": products}
    return view(model, **{name: view(getattr(model, name), **parts) for name, parts in changed.items()})


def each_distance_once(model: Any, n_edges: int) -> Any:
    """A view of a MACE whose radial networks compute each edge and its reverse once.

    They map a distance to the weights of a tensor product, and take a quarter of the time. The view must be called with
    the edges in the order of `Edges.one_way_first`. The model itself stays as it is, for other threads may be using it.
    """
    one_way = n_edges // 2
    features: list[Any] = [None, None]  # of both directions, and of one

    def embedding(lengths: Tensor, elements: Tensor, ends: Tensor, numbers: Tensor) -> Any:
        found = model.radial_embedding(lengths[:one_way], elements, ends[:, :one_way], numbers)
        # The features, from some version on with the cutoff function that is still to be applied.
        several = found if isinstance(found, tuple) else (found,)
        both = tuple(None if x is None else torch.cat((x, x)) for x in several)
        features[:] = both[0], several[0]
        return both if isinstance(found, tuple) else both[0]

    def once(radial: nn.Module) -> Callable[..., Tensor]:
        def weights(*given: Tensor) -> Tensor:
            # Some interactions add the features of the two atoms, which are not the same both ways.
            if len(given) != 1 or given[0] is not features[0]:
                return radial(*given)
            found = radial(features[1])
            return torch.cat((found, found))

        return weights

    layers = {
        name: view(layer, conv_tp_weights=once(layer.conv_tp_weights))
        for name, layer in model.interactions._modules.items()
    }
    return view(model, radial_embedding=embedding, interactions=view(model.interactions, **layers))
