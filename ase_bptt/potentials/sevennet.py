"""SevenNet: equivariant message passing for large systems (Park et al., J. Chem. Theory Comput. 20, 4857 (2024))."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..threads import quiet, view
from ..tuning import staged
from . import require
from .faster_layers import Rows, convolution, of_lengths, one_way_first

VARIANTS = ("7net-0", "7net-l3i5", "7net-mf-0", "7net-0_22may2024")
"""What the package sevenn carries; it would download others."""
BACKENDS = {"cuequivariance_config": {"use": False}, "use_flash_tp": False, "use_oeq": False}
ENERGY = "atomic_energy"
IN_BATCHES = "_is_batch_data"
"""Attribute of sevenn's layers: whether they are given batches of structures."""
RADIAL = "weight_nn"
"""That of its convolutions which holds their radial network."""


class SevenNet(Potential):
    """A module of sevenn, seen as a Potential.

    Edges, live positions and live cells are ours; sevenn's own layer for forces is left out. The
    module is used as it is, not copied.

    Parameters
    ----------
    model : sevenn.nn.sequential.AtomGraphSequential
    settings : dict or None
        The configuration that sevenn built it from, as its checkpoints hold it; without, the
        potential computes, but cannot be saved.
    modal : str or None
        For a model of several modals (levels of theory), the one to compute with; None takes the
        checkpoint's default, or the only one.
    """

    family = "sevennet"
    licence = "MIT for the weights in the package sevenn, which names none for them; others: see their source"
    extra = "sevennet"
    installation = 'for SevenNet, which is not to be beside MACE, by pip install "ase_bptt[sevennet]"'
    native_name = "sevennet.pth"
    atomic_properties = ("energies",)
    foreign_keywords = MappingProxyType({
        "modal": "the modal is part of the name, potential='sevennet:NAME:MODAL'",
        "file_type": "the file itself says what it is; give it as potential, with trust=True",
        "compute_atomic_virial": "leave it out and call atoms.get_stresses()",
    })  # fmt: skip

    model: Any
    _column: Tensor

    def __init__(self, model: Any, settings: dict[str, Any] | None = None, modal: str | None = None):
        super().__init__()
        self.model = model.eval()
        self.settings = settings
        self.cutoff = float(model.cutoff)
        self.atomic_numbers = frozenset(model.type_map)
        self.modals = dict(model.modal_map or {})
        self.modal = _modal(self.modals, modal, (settings or {}).get("default_modal"))
        device = next(model.parameters()).device
        column = torch.zeros(max(model.type_map) + 1, dtype=torch.int64, device=device)
        for number, index in model.type_map.items():
            column[number] = index
        self.register_buffer("_column", column, persistent=False)
        self.register_state_dict_post_hook(_without_copies)
        self.register_load_state_dict_pre_hook(_with_copies)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        edges, paired = one_way_first(edges, structures)
        data = {
            "x": self._column[structures.numbers],
            "edge_vec": edges.vectors(structures),
            "edge_index": torch.stack((edges.i, edges.j)),
            "batch": structures.batch,
        }
        if self.modal:
            data["modal_type"] = torch.full_like(data["batch"][: len(structures)], self.modals[self.modal])
        dtype = self.dtype
        # TorchScript's optimised graphs round differently after some calls; see MACE.
        with torch.jit.optimized_execution(False), Rows():
            for layer in self._layers_for_batches(paired):
                data = layer(data)
                if ENERGY in data:
                    break
                # sevenn's one-hot vectors are float32, whatever its weights are.
                data |= {name: value.to(dtype) for name, value in data.items() if value.is_floating_point()}
        atomic = data[ENERGY].squeeze(1)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _layers_for_batches(self, paired: bool) -> Iterator[Any]:
        """The layers, set to batches of structures; sevenn's calculator sets the model itself to single ones.

        Convolutions are ours, and their radial networks compute each distance once, where the edges are paired.
        """
        for layer in self.model:
            if paired and hasattr(layer, RADIAL):
                layer = view(layer, **{RADIAL: of_lengths(getattr(layer, RADIAL))})
            if hasattr(layer, RADIAL) and (convolved := convolution(layer.convolution)) is not None:
                layer = partial(_convolve, layer, convolved)
            if hasattr(layer, IN_BATCHES):
                layer = view(layer)
                setattr(layer, IN_BATCHES, True)
            yield layer

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, for `ase_bptt.tuning.select`."""
        return staged(
            self,
            before=("model.edge_embedding.", "model.onehot_to_feature_x."),
            # The name of a module begins with the number of its layer.
            stacks=("model.",),
            after=("model.reduce_", "model.rescale_atomic_energy.scale"),
        )

    @classmethod
    def environment(cls) -> str:
        return "MACE needs e3nn 0.4.4, SevenNet a newer one"

    @classmethod
    def from_name(cls, variant: str | None) -> SevenNet:
        """A pretrained model out of sevenn's wheel, with its modal if it has several: 7net-mf-0:R2SCAN."""
        name, _, modal = (variant or VARIANTS[0]).partition(":")
        if name.lower() not in VARIANTS:
            raise ValueError(
                f"The package sevenn carries no SevenNet {name!r}, but {', '.join(VARIANTS)}; give any other as the "
                "file of its checkpoint, with trust (--potential FILE --trust in the shell)."
            )
        util = require("sevenn.util", extra="sevennet")
        return cls._from_checkpoint(util.pretrained_name_to_path(name), modal or None)

    @classmethod
    def owns(cls, native: Any) -> bool:
        if isinstance(native, dict):
            return {"model_state_dict", "config"} <= native.keys()
        return type(native).__module__.startswith("sevenn.") and hasattr(native, "type_map")

    @classmethod
    def from_native(cls, native: Any) -> SevenNet:
        if not isinstance(native, dict):
            return cls(native)
        # sevenn brings checkpoints of older releases up to date only where it reads them from a file.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(native, Path(folder) / "checkpoint.pth")
            return cls._from_checkpoint(Path(folder) / "checkpoint.pth", None)

    @classmethod
    def _from_checkpoint(cls, path: str | Path, modal: str | None) -> SevenNet:
        sevenn, util = require("sevenn", extra="sevennet"), require("sevenn.util", extra="sevennet")
        with quiet():
            checkpoint = util.load_checkpoint(str(path))
            settings = checkpoint.config | BACKENDS | {"version": sevenn.__version__}
            return cls(checkpoint.build_model(), settings, modal)

    def config(self) -> dict[str, Any]:
        if self.settings is None:
            raise NotImplementedError(
                "A SevenNet module does not know its configuration and cannot be saved: load it from its checkpoint."
            )
        return {"modal": self.modal, "settings": {k: v for k, v in self.settings.items() if _is_json(v)}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SevenNet:
        settings = dict(config["settings"])
        # JSON has no whole numbers for keys.
        settings["_type_map"] = {int(number): index for number, index in settings["_type_map"].items()}
        build = require("sevenn.model_build", extra="sevennet")
        with quiet():
            model = build.build_E3_equivariant_model(settings | {"_flash_lammps": False})
        return cls(model.to(torch.get_default_dtype()), settings, config["modal"])

    def save_native(self, path: Path) -> None:
        settings = self.config()["settings"] | {"_type_map": dict(self.model.type_map), "default_modal": self.modal}
        weights = {name.removeprefix("model."): value.detach().cpu() for name, value in self.state_dict().items()}
        checkpoint = {
            "model_state_dict": weights,
            "config": settings,
            "optimizer_state_dict": {},
            "scheduler_state_dict": {},
            "epoch": 0,
            "hash": uuid.uuid4().hex,
            "metadata": dict(self.metadata),
        }
        torch.save(checkpoint, path)


def _convolve(layer: Any, convolved: Callable[..., Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """sevenn's IrrepsConvolution, whose tensor product and sum are this function."""
    receivers, senders = data[layer.key_edge_idx]
    weights = layer.weight_nn(data[layer.key_weight_input])
    features = convolved(data[layer.key_x], data[layer.key_filter], weights, senders, receivers)
    return data | {layer.key_x: features / layer.denominator}


def _without_copies(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Leave out the constants that e3nn's layers hold a second time once they have been copied."""
    for name in [name for name in state if "._tensor_constant" in name]:
        del state[name]


def _with_copies(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fill in what `_without_copies` left out, or a strict load would miss it."""
    for name, value in module.named_buffers():
        if "._tensor_constant" in name:
            state.setdefault(prefix + name, value)


def _modal(known: dict[str, int], asked: str | None, default: str | None) -> str | None:
    if not known:
        if asked is not None:
            raise ValueError(f"This SevenNet has no modals, and {asked!r} is none: leave it out.")
        return None
    wanted = asked or default
    names = {name.lower(): name for name in known}
    if wanted is None and len(known) == 1:
        return next(iter(known))
    if (wanted or "").lower() not in names:
        raise ValueError(f"This SevenNet has the modals {', '.join(known)}; {wanted!r} is none of them.")
    return names[str(wanted).lower()]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
