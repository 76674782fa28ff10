"""MatterSim: an M3GNet that was trained on structures under a wide range of temperatures and pressures.

Yang et al., arXiv 2405.04967; M3GNet is that of Chen and Ong, Nat. Comput. Sci. 2, 718 (2022).
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..neighbors.search import two_at_each_atom
from ..potential import Potential, Prediction
from ..structures import Structures
from ..suggestions import unknown_name
from ..threads import quiet
from ..tuning import staged
from . import require
from .faster_layers import Rows, m3gnet_update

VARIANTS = ("1M", "5M")
PUBLISHED = "mattersim-v1.0.0-{}.pth"
CACHE = "~/.local/mattersim/pretrained_models"
"""Where mattersim keeps the published models that it has downloaded."""
STRAIGHT = 1 - 1e-7
"""mattersim's bound for the cosine of an angle, beyond which the derivative of the arc cosine is not finite."""


class MatterSim(Potential):
    """A module M3Gnet of mattersim, seen as a Potential.

    mattersim makes float32 graphs of single structures, and its module casts to float32 what it is given. Here the
    layers of that module are called one after another, in the dtype of the weights, on edges and angles of the whole
    batch.

    Parameters
    ----------
    model : mattersim.forcefield.m3gnet.m3gnet.M3Gnet
        Used as it is, not copied.
    version : str or None
        Which pretrained model it began as; stored with it.
    """

    family = "mattersim"
    licence = "MIT, that of the package mattersim, which names none for the weights"
    extra = "mattersim"
    further_installation = "pip install --no-deps mattersim"
    installation = f'for MatterSim by pip install "ase_bptt[mattersim]" and {further_installation}'
    native_name = "mattersim.pth"
    atomic_properties = ("energies",)
    foreign_keywords = MappingProxyType({
        "load_path": "give the file of a checkpoint as potential, with trust=True",
        "args_dict": "leave it out: neighbours and batches are made here",
        "compute_stress": "leave it out and call atoms.get_stress()",
    })  # fmt: skip

    model: Any

    def __init__(self, model: Any, version: str | None = None):
        super().__init__()
        self.model = model.eval()
        self.version = version
        self.cutoff = float(model.model_args["cutoff"])
        self.bond_cutoff = float(model.model_args["threebody_cutoff"])
        self.atomic_numbers = frozenset(range(1, model.max_z + 1))

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        # TorchScript's optimised graphs round differently after some calls; see MACE.
        with torch.jit.optimized_execution(False), Rows():
            atomic = self._atomic_energies(structures, edges)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _atomic_energies(self, structures: Structures, edges: Edges) -> Tensor:
        model = self.model
        vectors = edges.vectors(structures)
        lengths = vectors.norm(dim=1)
        first, second = two_at_each_atom(edges.i, lengths.detach() < self.bond_cutoff, structures.n_atoms)
        radial = model.rbf(lengths)
        angular = model.sbf(*_legs(vectors, lengths, first, second))
        species = nn.functional.one_hot(structures.numbers, model.max_z + 1).to(vectors)
        atoms, bonds = model.atom_embedding(species), model.edge_encoder(radial)
        ends, pairs = torch.stack((edges.i, edges.j)), torch.stack((first, second), dim=1)
        for block in model.graph_conv:
            bonds = block.three_body(
                edge_attr=bonds,
                three_basis=angular,
                atom_attr=atoms,
                edge_index=ends,
                three_body_index=pairs,
                edge_length=lengths.unsqueeze(1),
                # Numbers in each structure, which it sums up where it is not given the sums that follow.
                num_edges=None,
                num_triple_ij=first,
                total_num_bonds=len(lengths),
                three_body_edge_map=first,
            )
            networks = [(gated.g, gated.sigma) for gated in (block.gated_mlp_edge, block.gated_mlp_atom)]
            weights = block.edge_layer_edge(radial), block.edge_layer_atom(radial)
            bonds, atoms = m3gnet_update(ends, bonds, atoms, networks, weights)
        return model.normalizer(model.final(atoms).squeeze(1), structures.numbers)

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        return staged(
            self,
            before=("model.atom_embedding.", "model.edge_encoder."),
            stacks=("model.graph_conv.",),
            after=("model.final.", "model.normalizer."),
        )

    @classmethod
    def from_name(cls, variant: str | None) -> MatterSim:
        """A published model: 1M (default) or 5M, from mattersim's folder or, at the first use, downloaded by it.

        Raises
        ------
        ConnectionError
            Where its file is not in that folder and cannot be downloaded.
        """
        names = {name.lower(): name for name in VARIANTS}
        version = names.get((variant or VARIANTS[0]).lower())
        if version is None:
            raise unknown_name("MatterSim", str(variant), VARIANTS)
        path = Path(CACHE).expanduser() / PUBLISHED.format(version)
        if not path.is_file():
            downloads = require("mattersim.utils.download_utils", extra=cls.extra)
            try:
                with quiet():
                    downloads.download_checkpoint(path.name, save_folder=str(path.parent))
            except OSError as error:
                raise ConnectionError(
                    f"The MatterSim model {version!r} is not on this machine and could not be downloaded "
                    f"({type(error).__name__}): connect once, put its file {path.name} into {path.parent}, or give "
                    "that file with trust (--potential FILE --trust in the shell)."
                ) from error
        found = cls.from_native(torch.load(path, map_location="cpu", weights_only=True))
        found.version = version
        return found

    @classmethod
    def owns(cls, native: Any) -> bool:
        if isinstance(native, dict):
            return native.get("model_name") == "m3gnet" and {"model", "model_args"} <= native.keys()
        return type(native).__module__.startswith("mattersim.") and hasattr(native, "model_args")

    @classmethod
    def from_native(cls, native: Any) -> MatterSim:
        if not isinstance(native, dict):
            return cls(native)
        weights = native["model"]
        model = _build(native["model_args"]).to(next(w.dtype for w in weights.values() if w.is_floating_point()))
        # As mattersim does, which leaves what it does not know.
        lost = set(model.load_state_dict(weights, strict=False).missing_keys) & dict(model.named_parameters()).keys()
        if lost:
            raise ValueError(f"This checkpoint of MatterSim lacks {len(lost)} of its weights, as {min(lost)}.")
        return cls(model, native.get("version"))

    def config(self) -> dict[str, Any]:
        return {"version": self.version, "arguments": dict(self.model.get_model_args())}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatterSim:
        return cls(_build(config["arguments"]).to(torch.get_default_dtype()), config["version"])

    def save_native(self, path: Path) -> None:
        checkpoint = {
            "model_name": "m3gnet",
            "model": {name: value.detach().cpu() for name, value in self.model.state_dict().items()},
            "model_args": dict(self.model.get_model_args()),
            # mattersim's own training would continue from these.
            "optimizer": {},
            "scheduler": {},
            "ema": {},
            "last_epoch": -1,
            "validation_metrics": {"loss": 0.0},
            "description": "",
            "version": self.version,
            "metadata": dict(self.metadata),
        }
        torch.save(checkpoint, path)


def _build(arguments: dict[str, Any]) -> Any:
    module = require("mattersim.forcefield.m3gnet.m3gnet", extra="mattersim")
    with quiet():
        return module.M3Gnet(**arguments, device="cpu")


def _legs(vectors: Tensor, lengths: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The length of the second leg of each angle, in Å, and the angle in radians."""
    # The derivative of index_select is faster than that of indexing.
    one, two = (lengths.index_select(0, leg) for leg in (first, second))
    products = (vectors.index_select(0, first) * vectors.index_select(0, second)).sum(1)
    return two, (products / (one * two)).clamp(-STRAIGHT, STRAIGHT).acos()
