"""A batch of structures as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.symbols import Symbols
from torch import Tensor

from .charges import SPECIFIED, charge_and_spin, info_of
from .constraints import Map, Projection, drift, fixed, maps_of, orthogonal
from .utils import as_device, lasting_property

Self = TypeVar("Self", bound="Structures")
LASTING = frozenset({"batch", "force_map", "step_map", "movable", "drift"})
"""Properties that are the same in all frames of a batch; kept, so that none may be a tensor of inference mode."""
PER_ATOM, PER_STRUCTURE = ("positions", "numbers", "masses"), ("cells", "pbc", "charges", "spins")
FLOATS = ("positions", "masses", "cells", "charges", "spins")


@dataclass(eq=False)
class Structures:
    """A batch of structures, their atoms one after another.

    Attributes
    ----------
    positions : Tensor, shape (n_atoms, 3)
        Cartesian positions in Å. May require gradients.
    cells : Tensor, shape (n, 3, 3)
        Cell vectors as rows, in Å; zero vectors where there is no cell.
    pbc : Tensor of bool, shape (n, 3)
    numbers : Tensor of int64, shape (n_atoms,)
        Atomic numbers.
    masses : Tensor, shape (n_atoms,)
        In amu.
    charges, spins : Tensor, shape (n,)
        Charge of each structure in elementary charges, and its spin multiplicity 2S + 1: ``info["charge"]`` and
        ``info["spin"]`` of the Atoms, or 0 and 1.
    counts : tuple of int, length n
        Atoms in each structure.
    constraints : tuple of tuple of str, length n
        Class names of the constraints on each of the Atoms it came from.
    maps : tuple of (maps of forces, maps of steps), length n
        Those of the constraints that are linear maps, as `ase_bptt.constraints.maps_of` gives them.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import Structures, delta_q, relax
    >>> start = Structures.from_atoms([molecule("N2"), molecule("CO")])
    >>> start
    Structures(N2, CO; 2 in all, 4 atoms, float64 on cpu)
    >>> start = start.replace(positions=start.positions.requires_grad_())
    >>> delta_q(relax("emt", start, steps=2), [molecule("N2"), molecule("CO")]).sum().backward()
    >>> start.positions.grad.shape
    torch.Size([4, 3])
    """

    positions: Tensor
    cells: Tensor
    pbc: Tensor
    numbers: Tensor
    masses: Tensor
    counts: tuple[int, ...]
    constraints: tuple[tuple[str, ...], ...]
    maps: tuple[tuple[tuple[Map, ...], tuple[Map, ...]], ...] = ()
    charges: Tensor = None  # type: ignore[assignment]
    spins: Tensor = None  # type: ignore[assignment]

    lasting: ClassVar[frozenset[str]] = LASTING

    def __post_init__(self) -> None:
        for name, usual in zip(("charges", "spins"), SPECIFIED.values(), strict=True):
            if getattr(self, name) is None:
                setattr(self, name, self.masses.new_full((len(self.counts),), usual))

    @classmethod
    def from_atoms(
        cls,
        atoms: Sequence[Atoms] | Atoms,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Structures:
        """Batch Atoms. dtype is float64 unless given; device is the CPU."""
        atoms = [atoms] if isinstance(atoms, Atoms) else atoms
        if not atoms:
            raise ValueError("There is no structure in this list: give at least one Atoms object.")
        device = as_device(device) if isinstance(device, str) else device
        floats = partial(torch.tensor, dtype=dtype or torch.float64, device=device)
        charges, spins = zip(*map(charge_and_spin, atoms), strict=True)
        return cls(
            positions=floats(np.concatenate([a.positions for a in atoms])),
            cells=floats(np.stack([a.cell.array for a in atoms])),
            pbc=torch.tensor(np.stack([a.pbc for a in atoms]), device=device),
            numbers=torch.tensor(np.concatenate([a.numbers for a in atoms]), dtype=torch.int64, device=device),
            masses=floats(np.concatenate([a.get_masses() for a in atoms])),
            counts=tuple(len(a) for a in atoms),
            constraints=tuple(tuple(type(c).__name__ for c in a.constraints) for a in atoms),
            maps=tuple(maps_of(a) for a in atoms) if any(a.constraints for a in atoms) else (),
            charges=floats(charges),
            spins=floats(spins),
        )

    def to_atoms(self) -> list[Atoms]:
        """The structures as new Atoms, without constraints and calculators."""
        x, m = (value.detach().cpu().double().split(self.counts) for value in (self.positions, self.masses))
        cells = self.cells.detach().cpu().double()
        info = map(info_of, self.charges.tolist(), self.spins.tolist())
        columns = zip(self.numbers.cpu().split(self.counts), x, cells, self.pbc.cpu(), m, info, strict=True)
        return [
            Atoms(numbers=z.numpy(), positions=x.numpy(), cell=c.numpy(), pbc=p.numpy(), masses=m.numpy(), info=info)
            for z, x, c, p, m, info in columns
        ]

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        some = ", ".join(self.formulas(3) + ["..."] * (len(self) > 3))
        size = f"{self.n_atoms} atoms, {str(self.positions.dtype).removeprefix('torch.')} on {self.positions.device}"
        return f"Structures({some}; {len(self)} in all, {size})"

    def formulas(self, most: int | None = None) -> list[str]:
        """Chemical formula of each structure, or of so many of them at most."""
        numbers = self.numbers.cpu().split(self.counts)[:most]
        return [str(Symbols(z.numpy()).get_chemical_formula()) for z in numbers]

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def constraint_names(self) -> list[str]:
        """Class names of all constraints in the batch, each once, sorted."""
        return sorted({name for names in self.constraints for name in names})

    @lasting_property
    def batch(self) -> Tensor:
        """Index of the structure that each atom belongs to, shape (n_atoms,)."""
        counts = torch.tensor(self.counts, dtype=torch.int64, device=self.numbers.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    @cached_property
    def volumes(self) -> Tensor:
        """In Å^3, shape (n,); zero where the cell is not three-dimensional."""
        return torch.linalg.det(self.cells).abs()

    @lasting_property
    def force_map(self) -> Projection | None:
        """The constraints' map of forces."""
        return Projection([forces for forces, _ in self.maps], self.counts, self.masses) if self.maps else None

    @lasting_property
    def step_map(self) -> Projection | None:
        """The constraints' map of steps."""
        return Projection([steps for _, steps in self.maps], self.counts, self.masses) if self.maps else None

    @lasting_property
    def movable(self) -> Tensor:
        """1 for each atom that can move, 0 for fixed atoms, shape (n_atoms,)."""
        if not self.maps:
            return torch.ones_like(self.masses)
        stuck = [fixed(steps, n) for (_, steps), n in zip(self.maps, self.counts, strict=True)]
        return 1 - torch.as_tensor(np.concatenate(stuck)).to(self.masses)

    @lasting_property
    def drift(self) -> Tensor | None:
        """Projectors onto the translations that the constraints allow, shape (n, 3, 3); None without constraints."""
        if not self.maps:
            return None
        free = [drift(steps, n) for (_, steps), n in zip(self.maps, self.counts, strict=True)]
        return torch.as_tensor(np.stack(free)).to(self.masses)

    @cached_property
    def orthogonal(self) -> list[bool]:
        """Whether each structure's map of forces is an orthogonal projection; empty where there are no constraints."""
        return [orthogonal(forces, n) for (forces, _), n in zip(self.maps, self.counts)]

    def project_forces(self, forces: Tensor) -> Tensor:
        """Forces projected by the constraints, shape (n_atoms, 3)."""
        return forces if self.force_map is None else self.force_map(forces)

    def project_steps(self, steps: Tensor) -> Tensor:
        """Displacements projected by the constraints, shape (n_atoms, 3)."""
        return steps if self.step_map is None else self.step_map(steps)

    def to(self: Self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same batch elsewhere or in another precision, attached to this one's positions and cells."""
        floats = {name: getattr(self, name).to(device, dtype) for name in FLOATS}
        if all(value is getattr(self, name) for name, value in floats.items()):
            return self
        return self.replace(**floats, numbers=self.numbers.to(device), pbc=self.pbc.to(device))

    def replace(self: Self, **changes: Any) -> Self:
        """The same batch with some tensors replaced; shares the others."""
        new = dataclasses.replace(self, **changes)
        if not {"counts", "maps"} & set(changes) and new.masses is self.masses:
            # What depends on neither positions nor cells is not recomputed in every frame.
            new.__dict__.update({name: self.__dict__[name] for name in self.lasting & self.__dict__.keys()})
        return new

    def select(self: Self, keep: Sequence[int]) -> Self:
        """The batch of the structures with these indices, in this order."""
        if list(keep) == list(range(len(self))):
            return self
        index = torch.tensor(list(keep), device=self.numbers.device, dtype=torch.int64)
        atoms = self.atoms_of(keep)
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[atoms] for name in PER_ATOM},
            **{name: getattr(self, name)[index] for name in PER_STRUCTURE},
            counts=tuple(self.counts[i] for i in keep),
            constraints=tuple(self.constraints[i] for i in keep),
            maps=tuple(self.maps[i] for i in keep) if self.maps else (),
        )

    def joined(self: Self, other: Self) -> Self:
        """The structures of both, as one batch."""
        maps = [of.maps or (((), ()),) * len(of) for of in (self, other)]
        return dataclasses.replace(
            self,
            **{name: torch.cat((getattr(self, name), getattr(other, name))) for name in PER_ATOM + PER_STRUCTURE},
            counts=self.counts + other.counts,
            constraints=self.constraints + other.constraints,
            maps=maps[0] + maps[1] if self.maps or other.maps else (),
        )

    def atoms_of(self, keep: Sequence[int]) -> Tensor:
        """Indices of the atoms of these structures, in this order."""
        ends = np.cumsum(self.counts)
        rows = [np.arange(ends[i] - self.counts[i], ends[i]) for i in keep]
        index = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return torch.as_tensor(index, device=self.numbers.device)

    def placed(self) -> Structures:
        """The structures as they stand: itself, but for a batch whose positions are not Cartesian."""
        return self

    def conditions(self) -> list[Tensor]:
        """What a whole relaxation depends on beside its start, the first axis being the structures: the cells."""
        return [self.cells]

    def under(self: Self, conditions: Sequence[Tensor]) -> Self:
        """The same batch under other `conditions`."""
        (cells,) = conditions
        return self.replace(cells=cells)

    def atomic_forces(self, forces: Tensor) -> Tensor:
        """The forces on the atoms where they stand, in eV/Å, shape (n_atoms, 3), from those on all rows."""
        return forces

    def undeformed(self) -> Structures:
        """The structures that a relaxation of these started from, as they were given."""
        return self

    def work(self) -> Tensor | None:
        """p V in eV, shape (n,), of structures whose cells move under pressure; None otherwise."""
        return None

    def reach(self) -> Tensor:
        """Largest coordinate of each structure in Å, shape (n,)."""
        return self.max(self.positions.abs().amax(1))

    def cell_rotations(self) -> list[np.ndarray]:
        """Motions of the rows of one structure that turn its cell with its atoms, shapes (n_rows, 3)."""
        return []

    def largest_force(self, forces: Tensor) -> Tensor:
        """Norm of the largest force on an atom of each structure, under its constraints, in eV/Å, shape (n,)."""
        largest = self.max(self.project_forces(forces).square().sum(1))
        # sqrt has no finite derivative at zero, which is where forces that vanish by symmetry are exactly.
        return torch.where(largest > 0, torch.where(largest > 0, largest, 1.0).sqrt(), largest)

    def sum(self, per_atom: Tensor) -> Tensor:
        """Sum over the atoms of each structure: (n_atoms, ...) to (n, ...)."""
        return per_atom.new_zeros(len(self), *per_atom.shape[1:]).index_add(0, self.batch, per_atom)

    def max(self, per_atom: Tensor) -> Tensor:
        """Maximum over the atoms of each structure: (n_atoms,) to (n,); zero at least."""
        return per_atom.new_zeros(len(self)).scatter_reduce(0, self.batch, per_atom, "amax")


def as_structures(
    structures: Structures | Atoms | Sequence[Atoms],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Structures:
    """Structures as they are; Atoms and lists of Atoms as a batch."""
    if isinstance(structures, Structures):
        return structures
    return Structures.from_atoms(structures, device=device, dtype=dtype)
