"""Structures on which a potential is asked what it has kept: rattled training structures, crystals, molecules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data.g2 import data as G2

from ..losses import displacements
from ..pairs import RelaxationPair
from ..potential import Potential
from .crystals import Crystal, known_crystals

KINDS = ("structures", "crystals", "molecules")
RATTLE = {"structures": (0.02, 0.12), "crystals": (0.02, 0.12), "molecules": (0.02, 0.06)}
"""Å: between which the standard deviation of a probe's rattling is drawn."""
STRAIN = 0.03
"""Largest component of a crystal's strain."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A structure, without constraints, its name and which of `KINDS` it is of."""

    atoms: Atoms
    kind: str
    name: str


def make_probes(
    potential: Potential, pairs: Sequence[RelaxationPair] = (), *, size: int = 24, seed: int = 0
) -> list[Probe]:
    """A probe set, the same for the same arguments.

    Parameters
    ----------
    potential : Potential
        Only elements that it knows are taken.
    pairs : sequence of RelaxationPair
        Probes begin anywhere on the straight line from their initial to their relaxed structures.
    size : int
        Probes of each kind at most: rattled structures of the pairs, rattled and strained crystals, and
        rattled molecules of the G2 set. Of structures there are always so many, if there are pairs; of
        crystals and molecules there may be fewer that the potential knows, each of which is taken once.
    seed : int

    Returns
    -------
    list of Probe
        By kind, in the order of `KINDS`.
    """
    makers: tuple[Callable[[np.random.Generator], list[tuple[str, Atoms]]], ...] = (
        lambda rng: [_between(pairs[k], rng) for k in _drawn(len(pairs), size, rng, again=True)],
        lambda rng: [_strained(crystal, rng) for crystal in _some(known_crystals(potential), size, rng)],
        lambda rng: [(name, molecule(name)) for name in _some(known_molecules(potential), size, rng)],
    )
    found = []
    for number, (kind, make) in enumerate(zip(KINDS, makers, strict=True)):
        rng = np.random.default_rng([seed, number])
        for name, atoms in make(rng):
            atoms.positions += rng.normal(0, rng.uniform(*RATTLE[kind]), atoms.positions.shape)
            found.append(Probe(atoms, kind, name))
    return found


def known_molecules(potential: Potential) -> list[str]:
    """Names of the molecules of the G2 set whose elements the potential knows; lone atoms are none."""
    known = potential.atomic_numbers
    every = ((name, molecule(name).numbers) for name in sorted(G2))
    return [name for name, numbers in every if len(numbers) > 1 and (known is None or {*numbers.tolist()} <= known)]


def _drawn(n: int, size: int, rng: np.random.Generator, *, again: bool) -> list[int]:
    """Indices of so many out of n, each as often as the others, and once only unless they may come again."""
    rounds = -(-size // n) if again and n else 1
    return [int(k) for _ in range(rounds) for k in rng.permutation(n)][:size]


def _some(known: list, size: int, rng: np.random.Generator) -> list:
    return [known[k] for k in _drawn(len(known), size, rng, again=False)]


def _between(pair: RelaxationPair, rng: np.random.Generator) -> tuple[str, Atoms]:
    atoms = pair.initial.copy()
    atoms.set_constraint()
    atoms.positions += rng.uniform() * displacements(pair.relaxed, pair.initial).numpy()
    return pair.id, atoms


def _strained(crystal: Crystal, rng: np.random.Generator) -> tuple[str, Atoms]:
    atoms = crystal.atoms(cubic=crystal.a is not None)
    # One atom a cell would feel no force, however it is rattled.
    while len(atoms) < 4:
        atoms = atoms.repeat((2, 1, 1) if len(atoms) > 1 else (2, 2, 1))
    strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return crystal.name, atoms
