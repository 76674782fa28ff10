"""The minima that one structure may relax to, found from many starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from ..cells import CellFreedom
from ..iterated_map import Status
from ..pairs.structure_matching import composition, find_duplicates
from ..potential import Potential
from ..steppers import Stepper
from ..suggestions import named
from ..throughput import Relaxed, relax_stream
from ..utils import check_count, check_positive, counted
from .starts import WAYS, Start, make_start, place_of, too_close

__all__ = ["WAYS", "Minimum", "Search", "Starts", "minima_of", "search_minima"]
SAME_ENERGY = 0.003
"""eV/atom by which the energies of ends in one minimum differ at most: what relaxations to 0.05 eV/Å leave."""
EXPLOSION = 1.0
"""eV/atom by which the energy of a start may rise before it is given up."""


@dataclass(frozen=True)
class Minimum:
    """A minimum that was found.

    Attributes
    ----------
    atoms : Atoms
        The end of lowest energy among those that are the same, with energy (eV) and forces (eV/Å).
    energy : float
        eV.
    above : float
        eV above the lowest minimum of this structure.
    starts : tuple of int
        Numbers of the starts that ended there; 0 is the structure as it was given.
    ways : tuple of str
        How these were made.
    """

    atoms: Atoms
    energy: float
    above: float
    starts: tuple[int, ...]
    ways: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many starts ended there."""
        return len(self.starts)


@dataclass(frozen=True)
class Search:
    """The distinct minima of one structure, lowest first, and what became of the other starts.

    Attributes
    ----------
    minima : tuple of Minimum
    n_starts : int
    unconverged, exploded, collapsed : int
        Starts that were out of steps, whose energy rose or was not finite, and whose atoms ended too close together.
    """

    minima: tuple[Minimum, ...]
    n_starts: int
    unconverged: int = 0
    exploded: int = 0
    collapsed: int = 0

    def __repr__(self) -> str:
        return f"Search({len(self.minima)} minima from {counted(self.n_starts, 'start')})"

    @property
    def found_lower(self) -> float | None:
        """eV by which the lowest minimum is below that of the structure as it was given; None where this has no end."""
        return next((m.above for m in self.minima if 0 in m.starts), None)


class Starts(Sequence[Atoms]):
    """The starts of many structures, each made when it is asked for: those of the first, then those of the second...

    Parameters
    ----------
    structures : sequence of Atoms
    n : int
        Starts of each, the structure itself included.
    ways : sequence of str
        How they are made, of `WAYS`.
    site : int, (float, float, float) or None
        Atom or place around which bonds are distorted; None finds what is odd.
    own : sequence of Atoms
        Starts of your own, each for the structures of the same composition, after the others.
    seed : int

    Raises
    ------
    ValueError
        For an unknown way or site, no starts at all, and an own start whose atoms no structure has.
    """

    def __init__(
        self,
        structures: Sequence[Atoms],
        n: int = 20,
        ways: Sequence[str] = WAYS,
        site: int | Sequence[float] | None = None,
        own: Sequence[Atoms] = (),
        seed: int = 0,
    ):
        check_count(n=n)
        for way in ways:
            named({name: name for name in WAYS}, way, "way to make starts")
        if not ways and n > 1:
            raise ValueError(f"No way to make starts was given: name some of {', '.join(WAYS)}.")
        self.structures, self.n, self.ways, self.site, self.seed = structures, n, tuple(ways), site, seed
        kinds = [composition(atoms) for atoms in structures]
        if site is not None:
            for atoms in structures:
                place_of(atoms, site)
        self.own = [[atoms for atoms in own if composition(atoms) == kind] for kind in kinds]
        for k, atoms in enumerate(own):
            if composition(atoms) not in kinds:
                raise ValueError(
                    f"Start {k} of your own, {atoms.get_chemical_formula()}, has the atoms of none of the structures: "
                    "leave it out, or add its structure."
                )
        self.first = np.cumsum([0, *(n + len(mine) for mine in self.own)]).tolist()

    def __len__(self) -> int:
        return self.first[-1]

    def start(self, k: int) -> Start:
        """A start, and how it was made."""
        place = int(np.searchsorted(self.first, k, side="right")) - 1
        number = k - self.first[place]
        if number >= self.n:
            return Start(self.own[place][number - self.n].copy(), "your own")
        return make_start(self.structures[place], number, self.ways, self.site, self.seed)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return self.start(range(len(self))[k]).atoms

    def of(self, place: int) -> range:
        """The starts of one structure."""
        return range(self.first[place], self.first[place + 1])


def search_minima(
    potential: Potential,
    structure: Atoms,
    *,
    n: int = 20,
    ways: Sequence[str] = WAYS,
    site: int | Sequence[float] | None = None,
    own: Sequence[Atoms] = (),
    stepper: Stepper | str = "fire",
    fmax: float = 0.02,
    steps: int = 500,
    cell: str | Sequence[int] = "fixed",
    pressure: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    memory: float | None = None,
    compile: bool = False,
) -> Search:
    """Relax a structure from many starts, and rank the distinct minima.

    Parameters
    ----------
    potential : Potential
    structure : Atoms
        Not changed; its constraints are obeyed.
    n : int
        Starts, the structure itself included.
    ways : sequence of str
        How the others are made, in turn: "rattle" (random displacements of all atoms), "distort" (one to four bonds
        around a site scaled by 0.4 to 1.6, as ShakeNBreak does), "break-symmetry" (the site and its neighbours pushed).
    site : int, (float, float, float) or None
        Atom, or place in Å, as of a vacancy; None takes atoms of rare elements or of odd surroundings in turn.
    own : sequence of Atoms
        Further starts, of the same atoms in any order.
    stepper, fmax, steps, batch_size, memory, compile
        As for `ase_bptt.throughput.relax_all`.
    cell, pressure
        As for `relax`.
    seed : int

    Returns
    -------
    Search
        Ends are the same minimum where they agree up to translations, rotations, the choice of the lattice vectors, the
        order of like atoms and the symmetry (`pairs.structure_matching.same_structure`), and in energy.

    Raises
    ------
    ValueError
        For an unknown way, site or stepper, and own starts of other atoms.
    NotImplementedError
        For elements that the potential does not know.

    Examples
    --------
    >>> from ase.cluster import Octahedron
    >>> from ase_bptt import load_potential, search_minima
    >>> found = search_minima(load_potential("emt"), Octahedron("Cu", 2), n=6, fmax=0.05)
    >>> found.minima[0].above
    0.0
    """
    check_positive(fmax=fmax)
    potential.check(potential.batch(structure))
    starts, freedom = Starts([structure], n, ways, site, own, seed), CellFreedom.of(cell, pressure)
    ends = dict(
        relax_stream(
            potential, [[(k, starts[k], freedom) for k in range(len(starts))]], stepper=stepper, fmax=fmax, steps=steps,
            cells_move=freedom.moves, explosion=EXPLOSION, batch_size=batch_size, memory=memory,
            compile=compile,
        )
    )  # fmt: skip
    return minima_of(starts, 0, ends)


def minima_of(starts: Starts, place: int, ends: Any) -> Search:
    """The minima of one structure, from where its starts ended.

    Parameters
    ----------
    starts : Starts
    place : int
        Of the structure among those of the starts.
    ends : mapping or sequence of Relaxed
        By the number of the start; those that are missing were left out.
    """
    good: list[tuple[int, Relaxed]] = []
    unconverged = exploded = collapsed = 0
    members = starts.of(place)
    for k in members:
        end: Relaxed = ends[k]
        if end.status is Status.DIVERGED:
            exploded += 1
        elif end.status is not Status.CONVERGED:
            unconverged += 1
        elif too_close(end.atoms):
            collapsed += 1
        else:
            good.append((k, end))
    good.sort(key=lambda found: (_energy(found[1]), found[0]))
    kinds = [composition(end.atoms) for _, end in good]
    first = find_duplicates(kinds, lambda i: good[i][1].atoms)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, same in enumerate(first):
        apart = (_energy(good[i][1]) - _energy(good[same][1])) / len(good[i][1].atoms)
        groups.setdefault((same, int(apart / SAME_ENERGY)), []).append(i)
    lowest = _energy(good[0][1]) if good else 0.0
    minima = tuple(
        Minimum(
            good[some[0]][1].atoms, _energy(good[some[0]][1]), _energy(good[some[0]][1]) - lowest,
            tuple(good[i][0] - members.start for i in some), tuple(starts.start(good[i][0]).way for i in some),
        )
        for some in sorted(groups.values(), key=lambda some: some[0])
    )  # fmt: skip
    return Search(minima, len(members), unconverged, exploded, collapsed)


def _energy(end: Relaxed) -> float:
    return float(end.atoms.calc.results["energy"])
