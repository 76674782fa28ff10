"""Forces and steps on the rows of structures whose cells move as linear maps: constraints, and what of a cell is free.

On a set of strains that is closed under composition, the map of -dE/dL is ASE's map of the virial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..constraints import KNOWN, Blocks, Map, Shift
from ..structures import Structures
from . import CellFreedom

Maps = tuple[tuple[Map, ...], tuple[Map, ...]]
FRACTIONAL = frozenset({"FixAtoms", "FixCom", "FixSubsetCom", "FixSymmetry"})
"""Constraints that act on s alike whatever the deformation of the cell."""


def maps_of_rows(structures: Structures, freedoms: Sequence[CellFreedom]) -> tuple[Maps, ...]:
    """The maps of forces and of steps of each structure; empty where none has any."""
    of_atoms: Sequence[Maps] = structures.maps or (((), ()),) * len(structures)
    found = [
        _of_one(structures, k, freedom, maps) if freedom.moves else maps
        for k, (freedom, maps) in enumerate(zip(freedoms, of_atoms, strict=True))
    ]
    return tuple(found) if any(forces or steps for forces, steps in found) else ()


def _of_one(structures: Structures, k: int, freedom: CellFreedom, of_atoms: Maps) -> Maps:
    """Those of one structure whose cell moves."""
    n = structures.counts[k]
    of_cell = _projection(structures, k, freedom)
    for map_ in of_atoms[0]:
        # Only an average over a space group has several blocks for an atom; strains are averaged over it, too.
        if isinstance(map_, Blocks) and len(map_.target) > n:
            averaged = np.mean([np.kron(r, r) for r in _rotations(map_, n)], axis=0)
            of_cell = averaged if of_cell is None else averaged @ of_cell
    last = () if of_cell is None else (_on_cell(of_cell, n),)
    forces, steps = ((*(_padded(map_, n) for map_ in maps), *last) for maps in of_atoms)
    return forces, steps


def _rotations(map_: Blocks, n: int) -> np.ndarray:
    """The Cartesian rotations of a map that averages n atoms over a space group, shape (k, 3, 3)."""
    count = len(map_.target) // n
    return map_.matrices[::n] * count


def _padded(map_: Map, n: int) -> Map:
    """A map of n atoms as one that leaves the three cell rows behind them alone."""
    if isinstance(map_, Shift):
        return Shift(*(np.concatenate((x, np.zeros(3))) for x in (map_.u, map_.v)))
    own = n + np.arange(3)
    return Blocks(
        np.concatenate((map_.target, own)),
        np.concatenate((map_.source, own)),
        np.concatenate((map_.matrices, np.tile(np.eye(3), (3, 1, 1)))),
    )


def _on_cell(map_: np.ndarray, n: int) -> Blocks:
    """A linear map of strains, shape (9, 9), as blocks that take the three cell rows behind n atoms to each other."""
    blocks = map_.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 3, 3)
    atoms = np.arange(n)
    return Blocks(
        np.concatenate((atoms, n + np.repeat(np.arange(3), 3))),
        np.concatenate((atoms, n + np.tile(np.arange(3), 3))),
        np.concatenate((np.tile(np.eye(3), (n, 1, 1)), blocks)),
    )


def _projection(structures: Structures, k: int, freedom: CellFreedom) -> np.ndarray | None:
    """The freedom's map of strains of structure k."""
    periodic = structures.pbc[k].cpu().numpy()
    return freedom.projection(structures.cells[k].detach().double().cpu().numpy()[periodic])


def check_movable(structures: Structures, k: int, freedom: CellFreedom) -> None:
    """Raise where the cell of structure k cannot move so."""
    name = structures.select([k]).formulas()[0]
    periodic = int(structures.pbc[k].sum())
    if periodic == 0:
        raise ValueError(
            f"{name} is periodic along no direction, so it has no cell to relax: take cell='fixed' for it, or set its "
            "pbc and cell."
        )
    if periodic < 3 and (freedom.pressure or freedom.hydrostatic or freedom.constant_volume):
        raise ValueError(
            f"{name} is periodic along {periodic} of 3 directions, so it has no volume: take cell='full' without a "
            "pressure, which relaxes the periodic directions."
        )
    held = [name for name in structures.constraints[k] if name not in FRACTIONAL]
    if held and not _commute(structures, k, freedom):
        raise NotImplementedError(
            f"{name} has the constraint {held[0]}, whose directions this cell would turn or shear, so that where the "
            "relaxation ends depends on its path: take cell='hydrostatic' or a mask that leaves these directions "
            "alone, FixAtoms, or cell='fixed'."
        )


def _commute(structures: Structures, k: int, freedom: CellFreedom) -> bool:
    """Whether the constraints on structure k that have directions act on s alike in all cells that it can have.

    Under ASE's filters atoms go with the cell, and are constrained in what they move besides. With a constraint's
    matrix P this is F^-1 P F in s, and P itself where it commutes with all strains. FixScaled has two such matrices,
    for ASE takes forces to fractional ones by the cell where its transpose would be right, and P in between.
    """
    projection = _projection(structures, k, freedom)
    strains = (np.eye(9) if projection is None else projection.T).reshape(9, 1, 3, 3)
    cell = structures.cells[k].detach().double().cpu().numpy()
    names = [name for name in structures.constraints[k] if name in KNOWN]
    for name, *maps in zip(names, *structures.maps[k], strict=True):
        if name in FRACTIONAL:
            continue
        matrices = [map_.matrices for map_ in maps if isinstance(map_, Blocks)]
        if name == "FixScaled":
            matrices.append(np.linalg.pinv(cell.T) @ matrices[1] @ cell.T)
        if not all(np.allclose(p @ strains, strains @ p, rtol=0, atol=1e-10) for p in matrices):
            return False
    return True
