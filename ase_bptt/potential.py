"""The contract between a potential and everything above it.

An adapter (`ase_bptt.potentials`) supplies energies from positions, cells and edges that are attached to
autograd. Forces, stress, second derivatives, dtype and device are handled here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn

from .neighbors import Edges
from .neighbors.lattice import named
from .structures import Structures
from .threads import alone
from .utils import autograd_enabled, savable

NO_GRADIENT = (
    "The energy of this {family} potential has no gradient with respect to the positions, so that there are no forces: "
    "its forward leaves autograd (detach, item, numpy, no_grad). Compute the energy from the tensors that it is given, "
    "or set conservative = False and override energy_and_forces, where forces are predicted directly."
)


@dataclass(eq=False)
class Prediction:
    """What an adapter computes from one pass.

    Attributes
    ----------
    energy : Tensor, shape (n,)
        Energy of each structure in eV, differentiable in positions, cells and weights.
    atomic_energies : Tensor or None, shape (n_atoms,)
        A partition of it over the atoms, in eV.
    magmoms : Tensor or None, shape (n_atoms,)
        Magnetic moments in Bohr magnetons.

    Examples
    --------
    >>> Prediction(energy=torch.tensor([-1.0])).atomic_energies is None
    True
    """

    energy: Tensor
    atomic_energies: Tensor | None = None
    magmoms: Tensor | None = None


class Potential(nn.Module):
    """Base class of the adapters: one subclass for each family of potentials.

    A subclass sets `family` and `cutoff` and implements `forward`. Further, as far as it offers them: by name,
    `from_name`; to be saved, `config` and `from_config`; to read the family's checkpoints, `owns` and `from_native`,
    with `read_native` where they are no pickles; to write them, `native_name` and `save_native`. It registers in the
    entry-point group ``ase_bptt.potentials``. For potentials that their arguments define,
    `ase_bptt.potentials.analytic.Parametrised` does most of it.

    >>> from ase.build import molecule
    >>> class Springs(Potential):  # each edge a spring of 1 eV/Å^2 that is 1 Å long at rest
    ...     family, cutoff = "springs", 3.0
    ...     def forward(self, structures, edges):
    ...         energies = (edges.vectors(structures).norm(dim=1) - 1.0).square() / 4  # an edge is there both ways
    ...         batch = structures.batch[edges.i]
    ...         return Prediction(energies.new_zeros(len(structures)).index_add(0, batch, energies))
    >>> from ase_bptt import relax
    >>> relax(Springs(), molecule("N2"), fmax=1e-3)
    Relaxation: N2, converged after 17 frames, energy 0.0000 eV, fmax 0.0010 eV/Å
    """

    family: ClassVar[str]
    extra: ClassVar[str | None] = None
    """The extra that installs the family, as in ``pip install "ase_bptt[extra]"``."""
    installation: ClassVar[str] = ""
    """How it is installed, where messages list the families: 'for MACE by pip install "ase_bptt[mace]"'."""
    further_installation: ClassVar[str] = ""
    """A second command, where the extra leaves out a package so as to spare its users what that requires."""
    licence: str = ""
    """That of the pretrained weights, where one holds for all of the family; for the model card."""
    native_name: str | None = None
    """Name of the file, or folder, as which `save` writes the family's native checkpoint."""
    conservative: ClassVar[bool] = True
    """Whether its forces are the negative gradient of its energy."""
    atomic_properties: tuple[str, ...] = ()
    """Which of ASE's 'energies', 'stresses', 'magmoms' the family has."""
    foreign_keywords: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keywords of the family's own ASE calculator, each with what to do here: `TorchCalculator` refuses them so."""

    metadata: Mapping[str, Any] = MappingProxyType({})
    """Where the weights come from, as JSON; goes along into the files that are written."""
    cutoff: float
    """Radius in Å within which it wants edges."""
    atomic_numbers: frozenset[int] | None = None
    """Elements it knows; None means all."""
    inputs: frozenset[str] = frozenset()
    """Which of "charge" and "spin" of a structure its energy depends on: `Structures.charges` and `.spins`."""

    def batch(self, atoms: Atoms | Sequence[Atoms]) -> Structures:
        """Atoms as tensors, where and in the dtype the potential computes."""
        return Structures.from_atoms(atoms, device=self.device, dtype=self.dtype)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        """Energies of a batch from its live positions, cells and edges."""
        raise NotImplementedError

    def energies(self, structures: Structures, edges: Edges) -> Tensor:
        """What a relaxation lowers, shape (n,) in eV: the energy, or under pressure the enthalpy E + p V."""
        energy, work = self(structures.placed(), edges).energy, structures.work()
        return energy if work is None else energy + work

    def energy_and_forces(
        self, structures: Structures, edges: Edges, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Energies (n,) in eV and forces (n_atoms, 3) in eV/Å, F = -dE/dX.

        With create_graph both stay differentiable in whatever the positions and weights depend
        on; otherwise both are detached. A direct-force potential overrides this call.
        """
        with autograd_enabled():
            structures, edges = savable(structures), savable(edges)
            positions = structures.positions
            if not (create_graph and positions.requires_grad):
                positions = positions.detach().requires_grad_()
            with nullcontext() if create_graph else self._weights_aside():
                energy = self.energies(structures.replace(positions=positions), edges)
                gradient, *_ = self._gradients(energy, [positions], create_graph)
        assert gradient is not None
        return (energy, -gradient) if create_graph else (energy.detach(), -gradient.detach())

    def _gradients(self, energy: Tensor, inputs: list[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
        """The gradients of the energy with respect to the positions, which must exist, and to other inputs."""
        found: Sequence[Tensor | None] = [None]
        if energy.requires_grad:
            found = torch.autograd.grad(energy.sum(), inputs, create_graph=create_graph, allow_unused=True)
        if found[0] is None:
            # To take the forces as zero would call any structure relaxed.
            raise RuntimeError(NO_GRADIENT.format(family=self.family))
        return found

    def results(self, structures: Structures, edges: Edges) -> dict[str, Tensor]:
        """Everything of one pass, detached: energy (n,), forces (n_atoms, 3), stress (n, 3, 3).

        stress is (1/V) dE/dstrain in eV/Å^3, positive under tension; NaN where the cell has no
        volume. atomic_energies and magmoms are added where the family has them. Where forces are
        no gradient of the energy there are energy and forces only.
        """
        if not self.conservative:
            energy, forces = self.energy_and_forces(structures, edges)
            return {"energy": energy.detach(), "forces": forces.detach()}
        # Where the cells act through the offsets alone, as in most families, this graph is as small as that
        # of the forces: no atom and no pair has to be strained in it.
        with autograd_enabled(), self._weights_aside():
            structures, edges = savable(structures), savable(edges)
            offsets = edges.offsets(structures)
            inputs = [x.detach().requires_grad_() for x in (structures.positions, structures.cells, offsets)]
            prediction = self(structures.replace(positions=inputs[0], cells=inputs[1]), edges.with_offsets(inputs[2]))
            gradients = self._gradients(prediction.energy, inputs)
        derivatives = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
        with torch.no_grad():
            virial = _virial(structures, edges, inputs, derivatives)
        found = {
            "energy": prediction.energy,
            "forces": -derivatives[0],
            "stress": virial / structures.volumes.where(structures.volumes > 0, torch.nan)[:, None, None],
            "atomic_energies": prediction.atomic_energies,
            "magmoms": prediction.magmoms,
        }
        return {name: value.detach() for name, value in found.items() if value is not None}

    @contextmanager
    def _weights_aside(self) -> Iterator[None]:
        """Keep the weights out of a graph that is for forces alone: it takes a third less memory without them.

        All threads share their flags, and a thread that takes a gradient meanwhile would lose it: where there are
        others, the weights stay.
        """
        live = [p for p in self._parameters_at_first if p.requires_grad] if alone() else []
        try:
            for p in live:
                p.requires_grad_(False)
            yield
        finally:
            for p in live:
                p.requires_grad_()

    @cached_property
    def _parameters_at_first(self) -> list[nn.Parameter]:
        """Found once, for the walk takes time in every frame; weights that are put in later cost time, no more."""
        return list(self.parameters())

    def stresses(self, structures: Structures, edges: Edges) -> Tensor:
        """Stress per atom in eV/Å^3, shape (n_atoms, 3, 3), summing to the stress of the cell."""
        raise NotImplementedError(f"The family {self.family!r} has no stresses per atom.")

    def check(self, structures: Structures) -> None:
        """Raise NotImplementedError for elements, charges and spins that the potential does not know."""
        known = self.atomic_numbers
        unknown = set() if known is None else {int(z) for z in structures.numbers.unique()} - known
        if unknown:
            first = int(structures.batch[[int(z) in unknown for z in structures.numbers]][0])
            where = f"{named(structures, first)}: " if len(structures) > 1 else ""
            raise NotImplementedError(
                f"{where}This {self.family} potential has no parameters for {symbols(unknown)}; "
                f"it knows {symbols(known or ())}."
            )

    @property
    def device(self) -> torch.device:
        return next(self._floats()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._floats()).dtype

    def _floats(self) -> Iterator[Tensor]:
        """Floating-point tensors of the module; a stand-in last, for a potential without any."""
        stand_in = torch.empty(0, dtype=torch.float64)
        return (t for t in chain(self.parameters(), self.buffers(), [stand_in]) if t.is_floating_point())

    # To be found by name, and to be saved. --------------------------------------------------

    @classmethod
    def environment(cls) -> str:
        """Why it is to be installed in an environment of its own, for messages; empty where it need not be."""
        return ""

    @classmethod
    def from_name(cls, variant: str | None) -> Potential:
        """The pretrained potential ``family:variant``; None is the family's default."""
        raise ValueError(f"The family {cls.family!r} has no pretrained potentials to load by name.")

    @classmethod
    def read_native(cls, path: Path) -> Any | None:
        """What a file of the family's own holds that torch.load cannot read, or a folder; None for any other.

        A folder is given without asking for trust: no code in it may be run.
        """
        return None

    @classmethod
    def owns(cls, native: Any) -> bool:
        """Whether this object (a module, or what a native checkpoint unpickles to) is the family's."""
        return False

    @classmethod
    def from_native(cls, native: Any) -> Potential:
        """Wrap a module, or what a native checkpoint unpickles to."""
        raise NotImplementedError

    def as_stored(self) -> Potential:
        """The form that is written: the potential itself, unless it computes in one that others could not read."""
        return self

    @property
    def form(self) -> str:
        """In which of the forms of its family it computes; empty where that is the stored one."""
        return ""

    def in_form(self, form: str) -> Potential:
        """The same potential in the `form` that another computed in."""
        return self

    def config(self) -> dict[str, Any]:
        """JSON from which `from_config` builds the same module, its weights apart."""
        raise NotImplementedError(f"The family {self.family!r} cannot be saved.")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Potential:
        """Build the module in torch's default dtype, with any weights."""
        raise NotImplementedError

    def save_native(self, path: Path) -> None:
        """Write the file, or make the folder, that the family's own tools load."""
        raise NotImplementedError


def _virial(structures: Structures, edges: Edges, inputs: list[Tensor], derivatives: list[Tensor]) -> Tensor:
    """dE/dstrain, shape (n, 3, 3), from positions, cells and offsets, which a strain stretches, and dE/d(each)."""
    positions, cells, offsets = inputs
    virial = cells.mT @ derivatives[1]
    owners = (structures.batch, structures.batch[edges.i])
    for owner, x, dx in zip(owners, (positions, offsets), (derivatives[0], derivatives[2]), strict=True):
        outer = x.unsqueeze(2) * dx.unsqueeze(1)
        virial.scatter_add_(0, owner[:, None, None].expand_as(outer), outer)
    return (virial + virial.mT) / 2


def symbols(numbers: Iterable[int]) -> str:
    """Chemical symbols in the order of the periodic table, for messages."""
    return " ".join(chemical_symbols[z] for z in sorted(numbers))
