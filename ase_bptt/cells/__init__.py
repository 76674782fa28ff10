"""Which degrees of freedom of a cell are relaxed beside the atoms, and at what pressure.

A cell moves by its deformation gradient F = expm(L): positions are s F^T and cell vectors C0 F^T, with positions s and
vectors C0 (rows) before the deformation. What is relaxed is s and the logarithmic strain L (3 x 3), as under ASE's
`FrechetCellFilter`; a `CellFreedom` is the linear subspace that L is kept in. `ase_bptt.cells.strained` holds such a
batch as rows, so that steppers and adjoints need not know of cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.stress import voigt_6_to_full_3x3_stress

from ..suggestions import unknown_name

__all__ = ["CELLS", "CellFreedom", "freedoms"]

Mask = tuple[tuple[bool, ...], ...]
CellChoice = Any
"""What a user gives for one cell: a name of `CELLS`, a mask, or a `CellFreedom`."""
DIAGONAL = np.eye(3, dtype=bool)


@dataclass(frozen=True)
class CellFreedom:
    """What of one cell is relaxed.

    Attributes
    ----------
    moves : bool
        False fixes the whole cell.
    hydrostatic : bool
        Volume alone, at constant shape.
    constant_volume : bool
        Shape alone.
    mask : 3 x 3 of bool or None
        Components of the strain that are relaxed; None relaxes all.
    pressure : float
        eV/Å^3, as in ASE (1 GPa is 0.00624 eV/Å^3): the enthalpy E + p V is minimised.

    Raises
    ------
    ValueError
        For what is no mask, and for a pressure that is no finite number.
    NotImplementedError
        For strains that are not closed under composition: a shear alone, or axes that are fixed by the mask of a cell
        that is hydrostatic or of constant volume.

    Examples
    --------
    >>> CellFreedom.of("hydrostatic", 0.01)
    CellFreedom(moves=True, hydrostatic=True, constant_volume=False, mask=None, pressure=0.01)
    >>> CellFreedom.of([1, 1, 0, 0, 0, 1]).name
    'mask'
    """

    moves: bool = False
    hydrostatic: bool = False
    constant_volume: bool = False
    mask: Mask | None = None
    pressure: float = 0.0

    @classmethod
    def of(cls, cell: CellChoice, pressure: float = 0.0) -> CellFreedom:
        """From a name of `CELLS` or a mask: six numbers in ASE's order (xx, yy, zz, yz, xz, xy), or 3 x 3.

        Raises
        ------
        ValueError
            For unknown names and masks of another shape, for a pressure that is no finite number, and for a pressure
            on a cell that is fixed.
        NotImplementedError
            For a mask whose strains are not closed under composition, such as a shear alone.
        """
        found = cell if isinstance(cell, cls) else _named(cell)
        pressure = _number(pressure) or found.pressure
        if pressure and not found.moves:
            raise ValueError(
                f"A pressure of {pressure:g} eV/Å^3 ({pressure / units.GPa:g} GPa) does nothing to a cell that is "
                "fixed: take cell='full' (--cell full in the shell), or leave the pressure out."
            )
        return replace(found, pressure=pressure)

    @property
    def name(self) -> str:
        """As in `CELLS`, or "mask"."""
        bare = replace(self, pressure=0.0)
        return next((name for name, freedom in CELLS.items() if freedom == bare), "mask")

    def todict(self) -> dict[str, Any]:
        """As JSON; `CellFreedom(**...)` makes it again, lists in place of tuples included."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __post_init__(self) -> None:
        _number(self.pressure)
        if self.mask is not None:
            object.__setattr__(self, "mask", _rows(_mask(self.mask)))
        if not symmetric(self.projection(np.eye(3))):
            raise NotImplementedError(
                "This mask fixes axes by which the cell would keep its volume or its shape, so that strains leave the "
                "mask: relax all three axes, or the mask alone."
            )

    def projection(self, periodic: np.ndarray) -> np.ndarray | None:
        """The linear map of strains that keeps to these degrees of freedom, shape (9, 9); None where all nine do.

        Hydrostatic strain, mask and constant volume in ASE's order, after the plane or line that the periodic cell
        vectors span. On a closed set of strains, the map of dE/dL is ASE's map of the virial.

        Parameters
        ----------
        periodic : array, shape (k, 3)
            The periodic cell vectors, in Å.
        """
        maps = []
        if len(periodic) < 3:
            _, _, axes = np.linalg.svd(periodic)
            span = axes[: len(periodic)].T @ axes[: len(periodic)]
            maps.append(np.kron(span, span))
        unit = np.eye(3).ravel()
        mean = np.outer(unit, unit) / 3
        if self.hydrostatic:
            maps.append(mean)
        if self.mask is not None:
            maps.append(np.diag(np.array(self.mask, dtype=float).ravel()))
        if self.constant_volume:
            maps.append(np.eye(9) - mean)
        found = np.eye(9)
        for map_ in maps:
            found = map_ @ found
        return found if maps else None


def freedoms(cell: CellChoice | Sequence[CellChoice], pressure: float | Sequence[float], n: int) -> list[CellFreedom]:
    """A `CellFreedom` for each of n structures, from one for all or one for each.

    Raises
    ------
    ValueError, NotImplementedError
        As `CellFreedom.of`, and for another number of them than of structures.
    """
    alike = isinstance(cell, str | CellFreedom) or _is_mask(cell)
    each = [cell] * n if alike else list(cell)
    one = isinstance(pressure, str) or np.ndim(pressure) == 0
    pressures = [_number(pressure)] * n if one else [_number(p) for p in pressure]  # type: ignore
    for name, given in (("cells", each), ("pressures", pressures)):
        if len(given) != n:
            raise ValueError(f"There are {len(given)} {name} for {n} structures: give one for all, or one for each.")
    # One pressure for all is meant for those that can move.
    several = one and len({*map(repr, each)}) > 1
    found = []
    for k, (c, p) in enumerate(zip(each, pressures, strict=True)):
        try:
            found.append(CellFreedom.of(c, 0.0 if several and not CellFreedom.of(c).moves else p))
        except (ValueError, NotImplementedError) as error:
            raise error if alike and one else type(error)(f"Structure {k}: {error}") from error
    return found


def _number(pressure: Any) -> float:
    """A pressure in eV/Å^3; words are refused, for they may mean another unit."""
    try:
        found = math.nan if isinstance(pressure, str) else float(pressure)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"The pressure must be a finite number of eV/Å^3 (1 GPa is 0.00624), got {pressure!r}.")
    return found


def _named(cell: CellChoice) -> CellFreedom:
    if isinstance(cell, str):
        if cell.lower() not in CELLS:
            raise unknown_name("cell", cell, list(CELLS), ", or a mask of six numbers or 3 x 3")
        return CELLS[cell.lower()]
    full = _mask(cell)
    if not full.any():
        return CELLS["fixed"]
    return CELLS["full"] if full.all() else CellFreedom(moves=True, mask=_rows(full))


def _mask(given: Any) -> np.ndarray:
    """A mask of the strain, shape (3, 3), from that or from six numbers."""
    said = given.tolist() if isinstance(given, np.ndarray) else given
    try:
        mask = np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        mask = np.zeros(0)
    if mask.shape not in ((6,), (3, 3)):
        raise ValueError(
            f"A mask of the cell is six numbers in the order xx, yy, zz, yz, xz, xy, or 3 x 3; got {said!r}."
        )
    full = np.asarray(voigt_6_to_full_3x3_stress(mask) if mask.shape == (6,) else mask)
    if not np.isin(full, (0, 1)).all() or not (full == full.T).all():
        raise ValueError(f"A mask of the cell holds ones and zeros, symmetric about the diagonal; got {said!r}.")
    if not closed(full):
        raise NotImplementedError(
            f"The mask {said!r} relaxes a shear without the two axes that it mixes, so that strains leave the mask "
            "when they are applied in turn, and the end is in general no minimum: relax these axes, too, or take "
            "ASE's FrechetCellFilter without a gradient."
        )
    return full


def ase_filter(atoms: Atoms, cell: CellFreedom) -> Atoms | FrechetCellFilter:
    """ASE's filter with these degrees of freedom; the atoms themselves where the cell is fixed."""
    if not cell.moves:
        return atoms
    return FrechetCellFilter(
        atoms,
        mask=None if cell.mask is None else np.array(cell.mask, dtype=int),
        hydrostatic_strain=cell.hydrostatic,
        constant_volume=cell.constant_volume,
        scalar_pressure=cell.pressure,
    )


def closed(mask: np.ndarray) -> bool:
    """Whether deformations within the mask, one after another, stay within it."""
    relaxed = np.asarray(mask, dtype=bool)
    reached = (relaxed.astype(int) @ relaxed.astype(int)) > 0
    return not (reached & ~relaxed).any()


def symmetric(projection: np.ndarray | None) -> bool:
    """Whether a map of strains projects onto a subspace of them, so that no other strain is reached."""
    return projection is None or bool(np.allclose(projection, projection.T))


def _is_mask(cell: Any) -> bool:
    """Whether this is one mask, or meant for one, rather than one choice for each structure."""
    try:
        found = np.asarray(cell, dtype=float)
    except (TypeError, ValueError):
        return False
    # Several masks are of shape (n, 6) or (n, 3, 3).
    return found.ndim < 2 or (found.ndim == 2 and found.shape[1] != 6)


def _rows(mask: np.ndarray) -> Mask:
    return tuple(tuple(bool(x) for x in row) for row in np.asarray(mask).reshape(3, 3))


CELLS = {
    "fixed": CellFreedom(),
    "full": CellFreedom(moves=True),
    "hydrostatic": CellFreedom(moves=True, hydrostatic=True),
    "constant-volume": CellFreedom(moves=True, constant_volume=True),
}
"""By the names that `relax` and the shell take."""
