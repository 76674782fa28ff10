"""matgl: TensorNet and M3GNet of the Materials Graph Library, in its releases on PyTorch Geometric.

Ko et al., npj Comput. Mater. 11, 253 (2025); TensorNet is that of Simeon and De Fabritiis, arXiv 2306.06482, M3GNet
that of Chen and Ong, Nat. Comput. Sci. 2, 718 (2022).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from ..neighbors import Edges
from ..neighbors.search import two_at_each_atom
from ..potential import Potential, Prediction
from ..structures import Structures
from ..threads import Building, quiet, view
from ..tuning import staged
from ..utils import UNREADABLE
from . import require
from .faster_layers import Rows, each, m3gnet_update, tensor_messages

log = logging.getLogger(__name__)
FILES = ("model.json", "model.pt", "state.pt")
"""What matgl writes into the folder of a model: description, arguments, weights."""
CLASSES = ("M3GNet", "TensorNet")
OWNER = "materialyze"
"""Whose models a name without an owner means, as to matgl."""
CONSTANTS = frozenset({"data_mean", "data_std", "element_refs.property_offset"})
"""Buffers that no argument gives, as far as it is kept here."""


@dataclass(eq=False)
class Saved:
    """What the folder of a model holds."""

    arguments: dict[str, Any]
    """With which matgl built it; those of the network under "model"."""
    weights: dict[str, Tensor]
    metadata: dict[str, Any]


class MatGL(Potential):
    """A Potential of matgl that holds a TensorNet or an M3GNet, seen as one of ours.

    matgl makes float32 graphs of single structures, fixes the strain and the fractional coordinates, and
    differentiates by itself. Here its network is called on the edges and angles of the whole batch, with live
    positions and cells, in the dtype of the weights.

    Parameters
    ----------
    model : matgl.apps.pes.Potential
        Used as it is, not copied. Parameters that matgl keeps fixed become buffers.

    Raises
    ------
    NotImplementedError
        For a network of another kind, and for one whose energy depends on more than atoms and cells.
    """

    family = "matgl"
    licence = "of published models: see their page at https://huggingface.co/materialyze; of the package: BSD-3-Clause"
    extra = "matgl"
    installation = 'for matgl by pip install "ase_bptt[matgl]"'
    native_name = "matgl"
    atomic_properties = ("energies",)
    foreign_keywords = MappingProxyType({
        **dict.fromkeys(("state_attr", "total_charge", "ext_pot"), "leave it out: such models are not supported"),
        **dict.fromkeys(("stress_unit", "stress_weight"), "stresses are in eV/Å^3 already"),
        "use_voigt": "call atoms.get_stress(voigt=True)",
    })  # fmt: skip

    model: Any
    _types: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.settings = _settings(model._init_args)
        if getattr(model.model, "_use_warp", False) or hasattr(model.model, "_orig_mod"):
            raise NotImplementedError(
                "This matgl model computes by kernels that are not supported here: build it with use_warp=False and "
                "compile_model=False, or give its folder."
            )
        self.model = model.eval()
        _keep_fixed(model)
        self.cutoff = float(model.model.cutoff)
        numbers = torch.tensor([atomic_numbers[name] for name in model.model.element_types])
        self.atomic_numbers = frozenset(numbers.tolist())
        types = torch.zeros(int(numbers.max()) + 1, dtype=torch.int64)
        types[numbers] = torch.arange(len(numbers))
        self.register_buffer("_types", types.to(model.data_mean.device), persistent=False)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        model = self.model
        graph = SimpleNamespace(
            node_type=self._types[structures.numbers],
            pos=structures.positions,
            # As matgl has them; the derivative of indexing takes less time than with int64.
            edge_index=torch.stack((edges.i, edges.j)).to(torch.int32),
            pbc_offshift=edges.offsets(structures),
            batch=structures.batch,
            num_graphs=len(structures),
        )
        # TorchScript's optimised graphs round differently after some calls; see MACE.
        with torch.jit.optimized_execution(False), Rows():
            atomic = model.data_std * self._atomic_outputs(graph)
        if model.element_refs is not None:
            atomic = atomic + model.element_refs.property_offset[graph.node_type]
        # A mean belongs to a structure, whatever its size.
        counts = torch.tensor(structures.counts, device=structures.batch.device)
        atomic = atomic + (model.data_mean / counts)[structures.batch]
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _atomic_outputs(self, graph: Any) -> Tensor:
        network = self.model.model
        if not hasattr(network, "threebody_cutoff"):
            network = view(network, layers=each(network.layers, _with_messages))
            return network.final_layer(network.forward_features(graph)["readout"]).squeeze(1)
        # matgl keeps what its layers put out, and their graph, on the network that is called.
        network = view(network, graph_layers=each(network.graph_layers, _with_update))
        network(graph, l_g=self._angles(graph, network.threebody_cutoff))
        return network.feature_dict["readout"].squeeze(1)

    def _angles(self, graph: Any, cutoff: float) -> dict[str, Tensor]:
        """Every ordered two short edges of one atom, as matgl's function finds them atom by atom in numpy."""
        compute = require("matgl.graph._compute", extra="matgl")
        with torch.no_grad():
            # By its own function, for it compares these edges with those that it finds short.
            _, lengths = compute.compute_pair_vector_and_distance(graph.pos, graph.edge_index, graph.pbc_offshift)
            short = lengths <= cutoff
            first, second = two_at_each_atom(graph.edge_index[0], short, len(graph.pos))
        return {
            "line_edge_index": torch.stack((first, second)),
            "n_triple_ij": torch.bincount(first, minlength=len(short)),
            "kept_edge_ids": short.nonzero().squeeze(1),
        }

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""

        def named(*names: str) -> tuple[str, ...]:
            return tuple(f"model.model.{name}." for name in names)

        return staged(
            self,
            before=named("bond_expansion", "tensor_embedding", "embedding"),
            stacks=named("layers", "three_body_interactions", "graph_layers"),
            after=named("out_norm", "linear", "final_layer"),
        )

    @classmethod
    def from_name(cls, variant: str | None) -> MatGL:
        """A published model by matgl's name for it, from matgl's cache or, at the first use, downloaded into it."""
        if variant is None:
            raise ValueError(
                "matgl has many models: name one, as in matgl:TensorNet-PES-MatPES-PBE-2025.2, or give the folder of "
                "one as potential."
            )
        config, hub = require("matgl.config", extra=cls.extra), require("huggingface_hub", extra=cls.extra)
        name = variant if "/" in variant else f"{OWNER}/{variant}"
        try:
            with quiet():
                paths = [Path(hub.hf_hub_download(name, file, cache_dir=str(config.MATGL_CACHE))) for file in FILES]
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The model {name} is not in matgl's cache and did not come from huggingface.co "
                f"({type(error).__name__}): check its name and the connection, or give its folder as potential."
            ) from error
        return cls.from_native(cls.read_native(paths[0].parent))

    @classmethod
    def read_native(cls, path: Path) -> Saved | None:
        """What a folder of matgl's holds. Nothing in it is unpickled but tensors and numbers, so that no code runs."""
        if not all((path / name).is_file() for name in FILES):
            return None
        description = json.loads((path / FILES[0]).read_text())
        if "@class" not in description:
            return None
        if (held := description["@class"]) != "Potential":
            raise NotImplementedError(
                f"{path} holds a {held} of matgl and no energies: put it into a Potential of matgl, and save that."
            )
        # matgl tells torch which further types its files may hold.
        require("matgl", extra=cls.extra)
        try:
            arguments, weights = (torch.load(path / name, weights_only=True, map_location="cpu") for name in FILES[1:])
        except UNREADABLE as error:
            raise ValueError(
                f"The files of matgl in {path} cannot be read: they are damaged, or hold more than tensors and numbers "
                f"({type(error).__name__})."
            ) from error
        return Saved(arguments, weights, description.get("metadata") or {})

    @classmethod
    def owns(cls, native: Any) -> bool:
        return isinstance(native, Saved) or (type(native).__module__ == "matgl.apps.pes" and hasattr(native, "model"))

    @classmethod
    def from_native(cls, native: Any) -> MatGL:
        if not isinstance(native, Saved):
            return cls(native)
        settings = _settings(native.arguments)
        known = getattr(require("matgl.models", extra=cls.extra), settings["class"]).__version__
        if known > (version := native.arguments["model"].get("@model_version", 0)):
            log.warning(
                f"This {settings['class']} is of an older release of matgl (version {version} of the class, here "
                f"{known}): compare its energies with those of that release."
            )
        found = cls(_build(settings)).to(next(w.dtype for w in native.weights.values() if w.is_floating_point()))
        # As matgl does, which leaves what it does not know.
        missing, _ = found.model.load_state_dict(native.weights, strict=False)
        lost = set(missing) & (dict(found.model.named_parameters()).keys() | CONSTANTS)
        if lost:
            raise ValueError(f"This folder of matgl lacks {len(lost)} of the model's weights, as {min(lost)}.")
        return found

    def config(self) -> dict[str, Any]:
        return dict(self.settings)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatGL:
        return cls(_build(config)).to(torch.get_default_dtype())

    def save_native(self, path: Path) -> None:
        self.model.save(path, metadata=dict(self.metadata))


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """JSON that `_build` needs, from what a Potential of matgl says of itself."""
    network, references = arguments["model"], arguments.get("element_refs")
    own = network["init_args"]
    if network["@class"] not in CLASSES:
        raise NotImplementedError(
            f"This Potential of matgl holds a {network['@class']}, and only {' and '.join(CLASSES)} are supported."
        )
    unfit = {
        "an intensive output, and so no energy": own.get("is_intensive"),
        "several outputs": own.get("ntargets", 1) != 1,
        "the state of a structure among its inputs": own.get("include_state"),
        "charges among its outputs": arguments.get("calc_charge"),
        "matgl's ZBL repulsion, which matgl 4.1 does not compute for it either": arguments.get("calc_repuls"),
        "reference energies of several states": references is not None and torch.as_tensor(references).ndim > 1,
    }
    if reasons := [reason for reason, found in unfit.items() if found]:
        raise NotImplementedError(f"This {network['@class']} of matgl has {reasons[0]}: it is not supported here.")
    return {
        "class": network["@class"],
        # All is built in float32, as by matgl, whose constants are rounded so, and cast then.
        "arguments": {
            name: list(value) if isinstance(value, tuple) else value for name, value in own.items() if name != "dtype"
        },
        "references": 0 if references is None else len(references),
    }


def _build(settings: dict[str, Any]) -> Any:
    """A Potential of matgl with any weights, in float32."""
    models, pes = (require(name, extra="matgl") for name in ("matgl.models", "matgl.apps.pes"))
    if settings["class"] not in CLASSES:
        raise ValueError(f"{settings['class']} is none of matgl's networks {' and '.join(CLASSES)}.")
    arguments = settings["arguments"] | {"element_types": tuple(settings["arguments"]["element_types"])}
    with Building(torch.float32), quiet():
        # Not by its kernels for GPUs, whose second derivatives are not tested here.
        without = {"use_warp": False} if "use_warp" in arguments else {}
        network = getattr(models, settings["class"])(**arguments | without)
        network._init_args.update(arguments)
        return pes.Potential(network, element_refs=[0.0] * settings["references"] or None)


def _with_messages(layer: Any) -> Any:
    """A layer of TensorNet that sums its messages itself; it adds the sums of three parts, and here they are one."""
    layer = view(layer)
    layer.message, layer.aggregate = tensor_messages, lambda sums, *_: (sums, 0.0, 0.0)
    return layer


def _with_update(layer: Any) -> Any:
    """A layer of M3GNet whose convolution is `m3gnet_update`."""
    bond, atom = layer.conv.edge_update_func, layer.conv.node_update_func
    networks = [(bond.layers, bond.gates), (atom.layers, atom.gates)]

    def updated(ends: Tensor, bonds: Tensor, atoms: Tensor, state: Any, radial: Tensor, *_: Any) -> Any:
        weights = layer.conv.edge_weight_func(radial), layer.conv.node_weight_func(radial)
        return *m3gnet_update(ends, bonds, atoms, networks, weights), state

    return view(layer, conv=updated)


def _keep_fixed(model: Any) -> None:
    """The centres of the Gaussians are parameters, which matgl does not train: they become buffers."""
    basis = model.model.bond_expansion.rbf
    if (centers := basis._parameters.pop("centers", None)) is not None:
        basis.register_buffer("centers", centers.detach())
