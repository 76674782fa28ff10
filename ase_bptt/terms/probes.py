"""Probes, structures on which two potentials are compared, and the loss between energies and forces there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_numbers, chemical_symbols, reference_states
from ase.data.g2 import data as G2
from torch import Tensor
from torch.nn.functional import huber_loss

from ..displacements import displacements
from ..neighbors import find_edges
from ..pairs import RelaxationPair
from ..potential import Potential
from ..structures import PER_ATOM, PER_STRUCTURE, Structures
from ..throughput import single_points

KINDS = ("structures", "crystals", "molecules")
RATTLE = {"structures": (0.02, 0.12), "crystals": (0.02, 0.12), "molecules": (0.02, 0.06)}
"""Å: the range from which the standard deviation of a probe's rattling is drawn."""
STRAIN = 0.03
"""Largest component of a crystal's strain."""
COMPOUNDS: tuple[tuple[str, str, float], ...] = (
    ("MgO", "rocksalt", 4.21), ("NaCl", "rocksalt", 5.64), ("LiF", "rocksalt", 4.03), ("CaO", "rocksalt", 4.81),
    ("KBr", "rocksalt", 6.60), ("MgS", "rocksalt", 5.20), ("TiC", "rocksalt", 4.33), ("TiN", "rocksalt", 4.24),
    ("PbS", "rocksalt", 5.94), ("SnTe", "rocksalt", 6.33), ("GaAs", "zincblende", 5.65), ("SiC", "zincblende", 4.36),
    ("BN", "zincblende", 3.62), ("AlP", "zincblende", 5.46), ("AlAs", "zincblende", 5.66),
    ("AlSb", "zincblende", 6.14), ("GaP", "zincblende", 5.45), ("GaSb", "zincblende", 6.10),
    ("InP", "zincblende", 5.87), ("InAs", "zincblende", 6.06), ("InSb", "zincblende", 6.48),
    ("ZnS", "zincblende", 5.41), ("CdTe", "zincblende", 6.48), ("CuCl", "zincblende", 5.42),
    ("CsCl", "cesiumchloride", 4.12), ("NiAl", "cesiumchloride", 2.89),
    ("CaF2", "fluorite", 5.46), ("ZrO2", "fluorite", 5.09), ("CeO2", "fluorite", 5.41),
)  # fmt: skip
"""Formula, structure, and lattice constant in Å, near the experimental one."""
CHOICE = ("Si", "Cu", "MgO", "Al", "NaCl", "GaAs", "W", "C", "CaF2", "TiN", "Ge", "AlP", "InSb", "Pt", "Au", "Ag", "Pd",
          "Ni", "SiC", "GaP", "AlSb", "InAs")  # fmt: skip
"""Of different bonding; the drift report shows the first ten whose elements the potential knows."""
CUBIC = ("fcc", "bcc", "diamond")


@dataclass(frozen=True)
class Crystal:
    """A crystal's name, ASE's name of its structure, and its lattice constant in Å to start from."""

    name: str
    structure: str
    a: float | None = None

    def atoms(self, cubic: bool = False) -> Atoms:
        """Its primitive cell, or the cubic one."""
        return bulk(self.name, self.structure, a=self.a, cubic=cubic)

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers."""
        return frozenset(int(z) for z in self.atoms().numbers)


def _elements() -> list[Crystal]:
    found = []
    for name, state in zip(chemical_symbols, reference_states):
        structure, a = (str((state or {}).get(key, "")) for key in ("symmetry", "a"))
        if structure in (*CUBIC, "hcp") and a:
            found.append(Crystal(name, structure, float(a) if structure in CUBIC else None))
    return found


CRYSTALS = {crystal.name: crystal for crystal in (*_elements(), *(Crystal(*row) for row in COMPOUNDS))}


def known_crystals(potential: Potential) -> list[Crystal]:
    """The crystals all of whose elements the potential knows."""
    known = potential.atomic_numbers or frozenset(atomic_numbers.values())
    return [crystal for crystal in CRYSTALS.values() if crystal.elements <= known]


def chosen_crystals(potential: Potential, most: int = 10) -> list[Crystal]:
    """So many that the potential knows, those of `CHOICE` first, and of the others only cubic ones."""
    known = {crystal.name: crystal for crystal in known_crystals(potential) if crystal.a is not None}
    names = [name for name in CHOICE if name in known]
    return [known[name] for name in [*names, *(name for name in known if name not in names)][:most]]


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
        rattled molecules of the G2 set. A pair may serve several times, so that there are always this many
        structures, if there are pairs; each crystal and molecule that the potential knows is used once.
    seed : int

    Returns
    -------
    list of Probe
        By kind, in the order of `KINDS`.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.terms.probes import make_probes
    >>> [(probe.kind, probe.name) for probe in make_probes(load_potential("emt"), size=1)]
    [('crystals', 'Al'), ('molecules', 'CCH')]
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
    """Indices of so many out of n, each as often as the others, and only once without ``again``."""
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
    # With one atom in the cell there would be no force, however it is rattled.
    while len(atoms) < 4:
        atoms = atoms.repeat((2, 1, 1) if len(atoms) > 1 else (2, 2, 1))
    strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return crystal.name, atoms


FORCE, ENERGY = 0.1, 0.05
"""eV/Å and eV per atom: below, a deviation counts by its square, above linearly (Huber); it contributes 1/2 here."""
LARGEST_FORCE = 30.0
"""eV/Å: where a potential finds a larger force, the structure is outside what it was trained on."""


@dataclass(eq=False)
class Targets:
    """Structures with target energies and forces.

    Attributes
    ----------
    structures : Structures, n of them
    energies : Tensor, shape (n,)
        In eV.
    forces : Tensor, shape (n_atoms, 3)
        In eV/Å, before constraints; on every row where `structures` has rows of cells: -V stress / n_atoms, in eV.
    """

    structures: Structures
    energies: Tensor
    forces: Tensor

    @classmethod
    def of(cls, potential: Potential, atoms: Sequence[Atoms]) -> Targets:
        """The energies and forces of this potential, as it is now, as targets."""
        structures = potential.batch(atoms)
        _, *found = zip(*single_points(potential, atoms), strict=True)
        energies, forces = (torch.cat(column) for column in found)
        return cls(structures, energies, forces)

    def __len__(self) -> int:
        return len(self.structures)

    def valid(self) -> list[int]:
        """Indices of those with a finite energy and no force above `LARGEST_FORCE`."""
        largest = self.structures.max(self.forces.norm(dim=1).nan_to_num(nan=torch.inf))
        return (torch.isfinite(self.energies) & (largest < LARGEST_FORCE)).nonzero().squeeze(1).tolist()

    def select(self, keep: Sequence[int]) -> Targets:
        """Those with these indices, in this order."""
        index = torch.as_tensor(list(keep), dtype=torch.int64, device=self.energies.device)
        return Targets(self.structures.select(keep), self.energies[index], self.forces[self.structures.atoms_of(keep)])

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which `from_state` restores them; constraints are not among them."""
        names = PER_ATOM + PER_STRUCTURE
        tensors = {name: getattr(self.structures, name).detach().cpu() for name in names}
        labels = {"energies": self.energies.cpu(), "forces": self.forces.cpu()}
        return {**tensors, **labels, "counts": list(self.structures.counts)}

    @classmethod
    def from_state(cls, state: dict[str, Any], potential: Potential) -> Targets:
        """From what `state` returned, on the device and in the dtype of this potential."""
        tensors = {name: value for name, value in state.items() if name not in ("counts", "energies", "forces")}
        counts = tuple(state["counts"])
        structures = Structures(**tensors, counts=counts, constraints=((),) * len(counts))
        structures = structures.to(potential.device, potential.dtype)
        return cls(structures, *(state[name].to(structures.positions) for name in ("energies", "forces")))


def energies_and_forces(potential: Potential, structures: Structures) -> tuple[Tensor, Tensor]:
    """Energies (n,) in eV and forces in eV/Å of the potential, with a graph.

    The forces are those on the atoms, shape (n_atoms, 3), and on the rows of cells where `structures` has some.
    """
    edges = find_edges(structures.placed(), potential.cutoff)
    return potential.energy_and_forces(structures, edges, create_graph=True)


def label_loss(targets: Targets, energy: Tensor, forces: Tensor, *, energies: bool = True) -> Tensor:
    """Loss between energies (n,) in eV and forces (n_atoms, 3) in eV/Å and their targets, without a unit.

    The mean over the components of the forces of Huber's function of their deviation in units of `FORCE`, plus the
    mean over the structures of the same function of the deviation of the energy per atom in units of `ENERGY`.
    Forces are compared after projection on the constraints; fixed atoms do not count.
    """
    structures = targets.structures
    off = structures.project_forces(forces - targets.forces) / FORCE
    moving = (3 * structures.movable.sum()).clamp(min=1)
    found = huber_loss(off, torch.zeros_like(off), reduction="sum") / moving
    if energies:
        sizes = torch.tensor(structures.undeformed().counts, device=energy.device)
        off = (energy - targets.energies) / sizes / ENERGY
        found = found + huber_loss(off, torch.zeros_like(off))
    return found
