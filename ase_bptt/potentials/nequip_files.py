"""Files of NequIP: checkpoints of its trainer and packages are read, packages are written.

A package (``.nequip.zip``) holds the code that computes the model, and a checkpoint (``.ckpt``) is a pickle. What is
taken from either are the configuration and the weights: the model is built of the nequip that is installed.
"""

from __future__ import annotations

import contextvars
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from torch.package import PackageExporter, PackageImporter

from ..neighbors import find_edges
from ..structures import Structures
from ..threads import Building, quiet
from ..utils import autograd_enabled
from . import DTYPES, require

EXTENSION = ".nequip.zip"
SOLE = "sole_model"
"""What nequip calls the model where it is the only one."""
BUILDERS = ("NequIPGNNModel", "PresetNequIPGNNModel", "FullNequIPGNNModel", "ZBLPairPotential")
"""Functions of `nequip.model` that build a model from a configuration."""
PARTS = ("nequip.nn.pair_potential.ZBL", "nequip.nn.pair_potential.LennardJones")
"""Classes that a configuration may name within another; it could name anything, and nequip would call it."""
KERNELS = ("enable_OpenEquivariance", "enable_CuEquivariance")
"""Modifiers that compute the same in other ways."""
NO_ARGUMENTS = ("_target_", "seed", "model_dtype", "compile_mode")


@dataclass(eq=False)
class Saved:
    """What a file of NequIP holds: the configuration of a model and its weights, by their names in it."""

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def from_checkpoint(native: dict[str, Any]) -> Saved:
    """What a checkpoint of nequip's trainer holds; the averaged weights, where it averaged them."""
    if "schedulefree_optimizer_state_dict" in native:
        raise ValueError(
            "The weights of this NequIP checkpoint are averaged by its optimizer: package it by nequip-package build, "
            "and give the .nequip.zip file."
        )
    state, prefix = native["state_dict"], f"model.{SOLE}."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not weights:
        raise ValueError("This NequIP checkpoint holds several models, of which one cannot be chosen here.")
    settings = checked(native["hyper_parameters"]["model"])
    names = [name for name, _ in build(settings).named_parameters()]
    averaged = {name: state[f"ema.ema_weight_{k}"] for k, name in enumerate(names) if f"ema.ema_weight_{k}" in state}
    return Saved(settings, weights | averaged)


def from_package(path: Path) -> Saved:
    """What a package holds. It is a package of Python code, which is run."""
    if not path.name.endswith(EXTENSION):
        raise ValueError(f"{path} is a package of NequIP, whose tools want its name to end in .nequip.zip: rename it.")
    read = require("yaml", extra="nequip").safe_load
    with quiet(), autograd_enabled():
        importer = PackageImporter(str(path))
        config = read(importer.load_text("model", "config.yaml"))
        settings = checked(config["training_module"]["model"])
        model = require("nequip.model", extra="nequip").ModelFromPackage(str(path))[SOLE].eval()
        example = importer.load_pickle("model", "example_data.pkl", map_location="cpu")
        saved = Saved(settings, model.state_dict(), config.get("ase_bptt") or {})
        ours = loaded(saved)
        theirs, found = (one(dict(example))["total_energy"].detach().double() for one in (model, ours))
    limit = 1e-9 if ours.model_dtype is torch.float64 else 1e-5
    if not torch.allclose(theirs, found, rtol=limit, atol=limit * len(example["pos"])):
        raise ValueError(
            f"The nequip that is installed computes other energies than the code in {path}, off by "
            f"{(theirs - found).abs().max():.2g} eV for its example: install the release that it was made with."
        )
    return saved


def is_package(path: Path) -> bool:
    """Whether a file is one of nequip's packages."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "model/package_metadata.txt" for name in archive.namelist())


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model without what changes its speed alone, if it names only what builds models."""
    while settings.get("_target_") == "nequip.model.modify" and all(
        modifier.get("modifier") in KERNELS for modifier in settings["modifiers"]
    ):
        settings = settings["model"]
    settings = json.loads(json.dumps(settings))
    builders = [f"nequip.model.{name}" for name in BUILDERS]
    first, *others = _targets(settings)
    if first not in builders or not set(others) <= set(PARTS):
        raise ValueError(
            f"This NequIP model is made by {', '.join(map(str, (first, *others)))}, and only those can be built again "
            f"that are made by {', '.join(builders)}, with {', '.join(PARTS)} in them."
        )
    return settings


def _targets(value: Any) -> list[Any]:
    """What a configuration has called: for its whole, then within it."""
    if isinstance(value, list):
        return [name for part in value for name in _targets(part)]
    if not isinstance(value, dict):
        return []
    return ([value["_target_"]] if "_target_" in value else []) + _targets(list(value.values()))


def build(settings: dict[str, Any]) -> Any:
    """The GraphModel that a configuration describes, with any weights."""
    settings = checked(settings)
    model, utils, layers = (require(f"nequip.{name}", extra="nequip") for name in ("model", "model.utils", "nn"))
    builder = getattr(model, settings["_target_"].rpartition(".")[2])
    arguments = {name: value for name, value in settings.items() if name not in NO_ARGUMENTS}

    def made() -> Any:
        # As within another of its builders: on their own they demand settings of the whole process (torch's default
        # dtype, the seeds of random and numpy, e3nn's defaults), which then stay.
        utils._IS_BUILDING_MODEL.set(True)
        inner = builder(**arguments)
        default = str(torch.get_default_dtype()).removeprefix("torch.")
        return layers.GraphModel(inner, {**settings, "model_dtype": default}, inner.irreps_in)

    # In nequip's own dtype, on which some of the layers' constants depend, whatever it is cast to afterwards.
    dtype = DTYPES[settings.get("model_dtype", "float32")]
    with quiet(), Building(dtype):
        model = contextvars.copy_context().run(made)
    tell_dtype(model, dtype)
    return model


def loaded(saved: Saved) -> Any:
    """The GraphModel with its weights, in the dtype of most of them; nequip keeps some constants in float64."""
    dtypes = [value.dtype for value in saved.weights.values() if value.is_floating_point()]
    dtype = torch.float32 if torch.float32 in dtypes else torch.float64
    model = build(saved.settings)
    if model.model_dtype is not dtype:
        tell_dtype(model.to(dtype), dtype)
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of this NequIP model do not fit what the nequip that is installed builds from its "
            f"configuration: install the release that it was made with ({' '.join(str(error).split())[:300]})."
        ) from error
    return model


def tell_dtype(model: Any, dtype: torch.dtype) -> None:
    """Have the layers compute in this dtype, which they noted when they were made."""
    for module in model.modules():
        for name in ("_output_dtype", "model_dtype"):
            if vars(module).get(name, dtype) is not dtype:
                setattr(module, name, dtype)
    model._metadata["model_dtype"] = str(dtype).removeprefix("torch.")


def write_package(saved: Saved, path: Path) -> None:
    """Write a package that nequip's calculator, trainer and nequip-compile read."""
    contents = require("nequip.scripts._package_utils", extra="nequip")
    dump = require("yaml", extra="nequip").safe_dump
    model = loaded(saved).eval()
    config = {"training_module": {"model": saved.settings}, "ase_bptt": saved.metadata}
    about = {
        "versions": {name: str(require(name, extra="nequip").__version__) for name in ("e3nn", "nequip", "torch")},
        "external_modules": {},
        "package_version_id": 2,
        "available_models": ["eager"],
        "atom_types": dict(enumerate(model.type_names)),
    }
    with quiet(), PackageExporter(str(path)) as exporter:
        exporter.mock([f"{name}.**" for name in contents._MOCK_MODULES])
        exporter.extern([f"{name}.**" for name in contents._EXTERNAL_MODULES])
        exporter.intern([f"{name}.**" for name in contents._INTERNAL_MODULES])
        exporter.save_text("model", "config.yaml", dump(config))
        exporter.save_text("model", "package_metadata.txt", dump(about))
        exporter.save_pickle("model", "example_data.pkl", _example(model))
        exporter.save_pickle("model", "eager_model.pkl", nn.ModuleDict({SOLE: model}))


def _example(model: Any) -> dict[str, Tensor]:
    """Data of eight atoms, of which nequip-compile takes the shapes."""
    cutoff = float(model.metadata["r_max"])
    corners = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3), -1).reshape(-1, 3)
    symbols = [model.type_names[k % len(model.type_names)] for k in range(len(corners))]
    atoms = Atoms(symbols, scaled_positions=corners, cell=[1.4 * cutoff] * 3, pbc=True)
    atoms.rattle(0.02 * cutoff, seed=0)
    structures = Structures.from_atoms(atoms)
    edges = find_edges(structures, cutoff)
    types = torch.tensor([model.type_names.index(symbol) for symbol in symbols])
    return {
        "pos": structures.positions,
        "cell": structures.cells,
        "pbc": structures.pbc,
        "atom_types": types,
        "edge_index": torch.stack((edges.i, edges.j)),
        "edge_cell_shift": edges.shifts,
        "batch": structures.batch,
        "num_atoms": torch.tensor(structures.counts),
    }
