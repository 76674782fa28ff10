"""Forces and steps on the rows of structures whose cells move as linear maps: constraints, and what of a cell is free.

On a set of strains that is closed under composition, the map of -dE/dL is ASE's map of the virial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.constraints import FixSymmetry

from ..constraints import KNOWN, Blocks, Map, Shift
from ..neighbors.lattice import named
from ..structures import Structures
from . import CellFreedom, symmetric

Maps = tuple[tuple[Map, ...], tuple[Map, ...]]
SELECTIVE = "FixScaled"
FRACTIONAL = frozenset({"FixAtoms", "FixCom", "FixSubsetCom", "FixSymmetry", SELECTIVE})
"""Constraints that restrict s alike whatever the deformation of the cell."""


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
    n, of_atoms = structures.counts[k], _along_lattice(structures, k, freedom, of_atoms)
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


def allowed(strain: np.ndarray, atoms: Atoms, freedom: CellFreedom) -> np.ndarray:
    """The part of a strain, shape (3, 3), that a cell and the symmetry that its atoms keep leave free."""
    projection, cell = freedom.projection(atoms.cell.array[atoms.pbc]), atoms.cell.array.T
    found = strain if projection is None else (projection @ strain.ravel()).reshape(3, 3)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixSymmetry):
            rotations = cell @ np.asarray(constraint.rotations) @ np.linalg.inv(cell)
            found = (rotations @ found @ rotations.transpose(0, 2, 1)).mean(0)
    return found


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
    name = named(structures, k)
    periodic = int(structures.pbc[k].sum())
    if periodic == 0:
        raise ValueError(
            f"{name} is periodic along no direction, so it has no cell to relax: take cell='fixed' for it (--cell "
            "fixed in the shell), or set its pbc and cell."
        )
    if periodic < 3 and (freedom.pressure or freedom.hydrostatic or freedom.constant_volume):
        raise ValueError(
            f"{name} is periodic along {periodic} of 3 directions, so it has no volume: take cell='full' (--cell full "
            "in the shell) without a pressure, which relaxes the periodic directions."
        )
    if not symmetric(_projection(structures, k, freedom)):
        raise ValueError(
            f"{name} is periodic along directions that its mask mixes with others, so that those would move, too: take "
            "cell='full' (--cell full in the shell), which relaxes the periodic directions alone."
        )
    turned = [name for name in turned_constraints(structures, k, freedom) if name not in FRACTIONAL]
    if turned:
        raise NotImplementedError(
            f"{name} has the constraint {turned[0]}, whose directions this cell would turn or shear, so that where the "
            "relaxation ends depends on its path: take cell='hydrostatic' or a mask that leaves these directions "
            "alone, FixAtoms, or cell='fixed'."
        )
    if structures.cells.requires_grad and SELECTIVE in turned_constraints(structures, k, freedom):
        raise NotImplementedError(
            f"{name} has the constraint FixScaled, whose directions are those of its initial cell, and no gradient "
            "with respect to that cell passes through them: give cells that require no gradient."
        )


def turned_constraints(structures: Structures, k: int, freedom: CellFreedom) -> list[str]:
    """The constraints on structure k that ASE's filters apply to s otherwise in other cells that it can have.

    Under ASE's filters atoms go with the cell, and are constrained in what they move besides. With a constraint's
    matrix P this is F^-1 P F in s, and P itself where it commutes with all strains. FixScaled has two such matrices,
    for ASE takes forces to fractional ones by the cell where its transpose would be right, and P in between.
    """
    projection = _projection(structures, k, freedom)
    strains = (np.eye(9) if projection is None else projection.T).reshape(9, 1, 3, 3)
    cell = structures.cells[k].detach().double().cpu().numpy()
    found = []
    for name, forces, steps in zip(_known(structures, k), *structures.maps[k], strict=True) if structures.maps else ():
        if name in FRACTIONAL - {SELECTIVE} or not (isinstance(forces, Blocks) and isinstance(steps, Blocks)):
            continue
        matrices = [forces.matrices, steps.matrices]
        if name == SELECTIVE:
            matrices.append(np.linalg.pinv(cell.T) @ steps.matrices @ cell.T)
        if not all(np.allclose(p @ strains, strains @ p, rtol=0, atol=1e-10) for p in matrices):
            found.append(name)
    return found


def _known(structures: Structures, k: int) -> list[str]:
    """The constraints of structure k that have maps, in their order."""
    return [name for name in structures.constraints[k] if name in KNOWN]


def _along_lattice(structures: Structures, k: int, freedom: CellFreedom, of_atoms: Maps) -> Maps:
    """Maps in which FixScaled is the projection of s on the lattice vectors along which its atoms are free.

    Steps that ASE's filter takes keep fractional coordinates, and with them the vectors C0 along which s may change.
    Its forces do not (`turned_constraints`): they need not vanish where the energy is lowest. So both are projected
    here on the free vectors, orthogonally, wherever ASE's two maps are not alike in all cells.
    """
    if SELECTIVE not in turned_constraints(structures, k, freedom):
        return of_atoms
    forces, steps = (list(maps) for maps in of_atoms)
    for i, name in enumerate(_known(structures, k)):
        if name == SELECTIVE and isinstance(oblique := steps[i], Blocks):
            # Its image is spanned by the free vectors, and P P^+ is the orthogonal projection on that.
            along = oblique.matrices @ np.linalg.pinv(oblique.matrices)
            forces[i] = steps[i] = Blocks(oblique.target, oblique.source, along)
    return tuple(forces), tuple(steps)
