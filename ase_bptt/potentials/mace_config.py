"""A module of mace-torch without its weights, as JSON and back."""

from __future__ import annotations

from typing import Any

import torch

from . import quiet, require
from .mace_forms import is_reduced, path_counts, set_path_counts

GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs, "None": None}
"""The activations of the readouts, by the names that are written."""


def describe(model: Any, head: int) -> dict[str, Any]:
    """All that `build` needs to make a module of this architecture, as JSON.

    Parameters
    ----------
    model : mace.modules.MACE or ScaleShiftMACE
    head : int
        The one that is used, of those that the model has; its name is written beside the rest.

    Raises
    ------
    NotImplementedError
        Where mace-torch cannot say what the model was made of.
    """
    tools = require("mace.tools.scripts_utils", extra="mace")
    arguments = tools.extract_config_mace_model(model)
    if "error" in arguments:
        raise NotImplementedError(f"This MACE model cannot be saved: {arguments['error']}.")
    arguments |= {"use_reduced_cg": is_reduced(model), "cueq_config": None}
    return {
        "class": type(model).__name__,
        "head": model.heads[head] if hasattr(model, "heads") else None,
        "arguments": {name: _as_json(value) for name, value in arguments.items()},
        **({"paths": path_counts(model)} if arguments["use_reduced_cg"] else {}),
    }


def build(config: dict[str, Any]) -> Any:
    """The module that `describe` described; its weights, and the bases of a reduced one, are for `load_state_dict`."""
    modules = require("mace.modules", extra="mace")
    irreps = require("e3nn.o3", extra="mace").Irreps
    arguments = dict(config["arguments"])
    for name, value in arguments.items():
        if name.endswith("_cls") or name.endswith("_cls_first"):
            arguments[name] = getattr(modules.blocks, value)
        elif name.endswith("irreps") and value is not None:
            arguments[name] = irreps(value)
    arguments["gate"] = GATES[str(arguments["gate"])]
    # The reduced basis can be made with cuEquivariance only; it is read with the weights.
    arguments["use_reduced_cg"] = False
    arguments["atomic_energies"] = torch.tensor(arguments["atomic_energies"], dtype=torch.float64).numpy()
    with quiet():
        model = getattr(modules, config["class"])(**arguments)
    set_path_counts(model, config.get("paths", {}))
    model.use_reduced_cg = "paths" in config
    return model


def _as_json(value: Any) -> Any:
    """Classes and functions by name, arrays as lists, irreps as text."""
    if isinstance(value, type) or callable(value):
        return value.__name__
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | int | float | bool) or value is None:
        # e3nn's irreps are tuples, all others are JSON already
        return value
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return str(value) if type(value).__name__ == "Irreps" else [_as_json(v) for v in value]
