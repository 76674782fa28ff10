"""Forces and steps on the rows of structures whose cells move as linear maps: constraints, and what of a cell is free.

On a set of strains that is closed under composition, the map of -dE/dL is ASE's map of the virial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..constraints import Blocks, Map, Shift
from ..structures import Structures
from . import CellFreedom

Maps = tuple[tuple[Map, ...], tuple[Map, ...]]


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
    periodic = structures.pbc[k].cpu().numpy()
    of_cell = freedom.projection(structures.cells[k].detach().double().cpu().numpy()[periodic])
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
