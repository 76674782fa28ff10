"""The foundation models of mace-torch, by its own names; it downloads them at the first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from . import quiet, require

log = logging.getLogger(__name__)
DEFAULT = "medium"
LONG_RANGE = ("PolarMACE", "MACELES")
"""Classes of mace-torch whose energies reach beyond the cutoff."""


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
        raise ValueError(f"MACE has no foundation model {variant!r}; there are {', '.join(loaders)}.")
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
