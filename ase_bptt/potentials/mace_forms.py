"""The forms that one MACE takes: plain, with cuEquivariance's kernels, with or without a reduced product basis."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import quiet, require

log = logging.getLogger(__name__)


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
    dtype = torch.get_default_dtype()
    with quiet(), torch.random.fork_rng(), marked_as_it_is(model):
        try:
            made = convert(model, device=str(model.r_max.device))
        finally:
            torch.set_default_dtype(dtype)
    return made.to(model.r_max.device).train(model.training)


@contextmanager
def marked_as_it_is(model: Any) -> Iterator[None]:
    """mace-torch converts by the mark of the product basis, and cannot where it is wrong."""
    wrong = getattr(model, "use_reduced_cg", False) and not is_reduced(model)
    if wrong:
        model.use_reduced_cg = False
    try:
        yield
    finally:
        if wrong:
            model.use_reduced_cg = True


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
