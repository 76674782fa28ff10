"""The charge of a structure and its spin multiplicity, which stand in ``atoms.info``."""

from __future__ import annotations

import math
from typing import Any

from ase import Atoms

SPECIFIED = {"charge": 0.0, "spin": 1.0}
"""Keys of info, as mace's calculator and most data sets name them, and what holds where they are not set."""


def charge_and_spin(atoms: Atoms) -> tuple[float, float]:
    """Charge in elementary charges and spin multiplicity 2S + 1 of a structure: those in its info, or 0 and 1.

    >>> from ase.build import molecule
    >>> charge_and_spin(molecule("NH3", info={"charge": 1, "spin": 2}))
    (1.0, 2.0)

    Raises
    ------
    TypeError, ValueError
        For what is no Atoms object, and for what is no number.
    """
    if not isinstance(atoms, Atoms):
        raise TypeError(f"A structure is an Atoms object, and not {atoms!r}.")
    found: list[float] = []
    for name, usual in SPECIFIED.items():
        given = atoms.info.get(name, usual)
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"info[{name!r}] of {atoms.symbols} is {given!r}: give one number, its charge in elementary charges or "
                "its spin multiplicity, or delete it."
            )
        found.append(value)
    return found[0], found[1]


def info_of(charge: float, spin: float) -> dict[str, float]:
    """What `charge_and_spin` reads them from; nothing for what holds anyway."""
    found: dict[str, Any] = dict(zip(SPECIFIED, (charge, spin), strict=True))
    return {name: value for name, value in found.items() if value != SPECIFIED[name]}


def specified(atoms: Atoms) -> tuple[Any, Any]:
    """Charge and spin as they stand in info, whatever they are, to see whether they have changed."""
    return tuple(repr(atoms.info.get(name)) for name in SPECIFIED)  # type: ignore[return-value]
