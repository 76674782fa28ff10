"""MACE models beyond the module itself: their description as JSON, foundation models, and forms of their products."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..suggestions import hint
from ..threads import Building, quiet, view
from . import require

log = logging.getLogger(__name__)
GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs, "None": None}
"""The activations of the readouts, by the names that are written."""
DEFAULT = "medium"
LONG_RANGE = ("PolarMACE", "MACELES")
"""Classes of mace-torch whose energies reach beyond the cutoff."""


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


def load_foundation(variant: str | None) -> tuple[Any, str | None]:
    """A module of mace-torch for NAME or NAME:HEAD, and the head.

    Raises
    ------
    ValueError
        For a name that the installed mace-torch does not have, with those that it has.
    NotImplementedError
        For the names of MACE-POLAR.
    ConnectionError
        Where the file is not on this machine and cannot be downloaded.
    """
    variant = variant or DEFAULT
    name, _, head = variant.partition(":")
    loaders = _loaders()
    # mace-torch would also take a path or an address, and unpickle what is there.
    if name in getattr(require("mace.calculators.foundations_models", extra="mace"), "polar_model_names", ()):
        raise NotImplementedError(
            f"The MACE model {name!r} is a MACE-POLAR, whose electrostatics reach beyond the cutoff, which is not "
            f"supported: take another, such as mace:{DEFAULT}."
        )
    if name not in loaders:
        raise ValueError(
            f"MACE has no foundation model {variant!r}{hint(name, loaders)}; there are {', '.join(loaders)}."
        )
    log.info("mace:%s: mace-torch looks for it on this machine, and downloads it at the first use.", name)
    try:
        with quiet():
            return loaders[name](device="cpu", return_raw_model=True), head or None
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ConnectionError(
            f"The MACE model {name!r} is not on this machine and could not be downloaded "
            f"({type(reason).__name__}: {reason}): connect once, or give a file of it with trust "
            "(--potential FILE --trust in the shell)."
        ) from error


def _loaders() -> dict[str, Callable[..., Any]]:
    models = require("mace.calculators.foundations_models", extra="mace")
    found: dict[str, Callable[..., Any]] = {n: partial(models.mace_mp, model=n) for n in models.mace_mp_names if n}
    found |= {f"off-{n}": partial(models.mace_off, model=n) for n in models.mace_off_urls}
    return found | {"anicc": models.mace_anicc, "omol": models.mace_omol}


def is_accelerated(model: Any) -> bool:
    """Whether it computes with cuEquivariance."""
    return any(getattr(getattr(m, "cueq_config", None), "enabled", False) for m in model.modules())


def accelerated(model: Any) -> Any:
    """The same model with cuEquivariance's kernels, its weights copied.

    Raises
    ------
    ImportError
        Where cuEquivariance is missing, with the extra that brings it.
    """
    require("cuequivariance_torch", extra="cueq")
    if importlib.util.find_spec("cuequivariance_ops_torch") is None:
        log.warning(
            "cuEquivariance has no kernels here and is slower than without it: for a GPU, pip install "
            "cuequivariance-ops-torch-cu12, or the one of your CUDA."
        )
    return _converted(require("mace.cli.convert_e3nn_cueq", extra="mace").run, model)


def plain(model: Any) -> Any:
    """The same model with e3nn's kernels, which every installation reads, its weights copied."""
    return _converted(require("mace.cli.convert_cueq_e3nn", extra="mace").run, model)


def _converted(convert: Callable[..., Any], model: Any) -> Any:
    # Here alone torch's default dtype is changed for a moment, for all threads: mace-torch sets it to the model's,
    # passes it on to cuEquivariance, and leaves it so.
    with _converting, quiet(), Building():
        dtype = torch.get_default_dtype()
        try:
            made = convert(rightly_marked(model), device=str(model.r_max.device))
        finally:
            torch.set_default_dtype(dtype)
    return made.to(model.r_max.device).train(model.training)


_converting = threading.Lock()


def rightly_marked(model: Any) -> Any:
    """The model, or a view of it whose product basis is marked as what it is.

    mace-torch converts by the mark, and cannot where it is wrong.
    """
    if not getattr(model, "use_reduced_cg", False) or is_reduced(model):
        return model
    marked = view(model)
    marked.use_reduced_cg = False
    return marked


def is_reduced(model: Any) -> bool:
    """Whether its products use the reduced basis, which mace-torch makes by cuEquivariance.

    Without that package mace-torch marks models as reduced that are not.
    """
    marked = bool(getattr(model, "use_reduced_cg", False))
    products = [p.symmetric_contractions for p in model.products]
    if not (marked and all(hasattr(p, "contractions") for p in products)):
        return marked
    return any(
        _is_other_basis(contraction, str(irrep.ir))
        for product in products
        for contraction, irrep in zip(product.contractions, product.irreps_out, strict=True)
    )


def _is_other_basis(contraction: Any, irrep_out: str) -> bool:
    for degree in range(1, len(contraction.weights) + 2):
        found = getattr(contraction, f"U_matrix_{degree}").detach().double().cpu()
        full = _full_basis(str(contraction.coupling_irreps), irrep_out, degree)
        if found.shape != full.shape or not torch.allclose(found, full, atol=1e-5):
            return True
    return False


@cache
def _full_basis(irreps_in: str, irrep_out: str, degree: int) -> Tensor:
    tools = require("mace.tools.cg", extra="mace")
    return tools.U_matrix_real(irreps_in, irrep_out, degree, use_cueq_cg=False, dtype=torch.float64)[-1]


def path_counts(model: Any) -> dict[str, list[int]]:
    """How many paths each product of a reduced model has, by degree."""
    return {
        name: [getattr(c, f"U_matrix_{nu}").shape[-1] for nu in range(1, len(c.weights) + 2)]
        for name, c in _contractions(model).items()
    }


def set_path_counts(model: Any, counts: dict[str, list[int]]) -> None:
    """Make room for the bases and weights of a reduced model: their numbers are for `load_state_dict`."""
    for name, degrees in counts.items():
        product = model.get_submodule(name)
        for degree, n in enumerate(degrees, 1):
            basis = getattr(product, f"U_matrix_{degree}")
            setattr(product, f"U_matrix_{degree}", basis.new_zeros(*basis.shape[:-1], n))
        # The highest degree stands apart, the others follow from the next one down.
        product.weights_max = _room(product.weights_max, degrees[-1])
        for k, n in enumerate(reversed(degrees[:-1])):
            product.weights[k] = _room(product.weights[k], n)


def _room(weight: Tensor, n: int) -> nn.Parameter:
    return nn.Parameter(weight.new_zeros(weight.shape[0], n, weight.shape[2]))


def _contractions(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "Contraction"}
