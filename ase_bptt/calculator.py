"""A differentiable potential as an ASE Calculator, registered with ASE by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    PropertyNotImplementedError,
    all_changes,
    external_calculators,
    register_calculator_class,
)
from ase.stress import full_3x3_to_voigt_6_stress
from torch import nn

from .charges import specified
from .neighbors import NeighborList
from .potential import Potential
from .potentials import as_potential, families, family
from .structures import Structures
from .suggestions import keywords, unknown_keyword
from .utils import outside_inference_mode
from .weights import Version, weights_version

BASIC = ["energy", "free_energy", "forces", "stress"]
SETTABLE = frozenset({"potential", "device", "dtype", "skin", "trust"})
"""What `TorchCalculator.set` can change."""


class TorchCalculator(Calculator):
    """An ASE Calculator around a differentiable potential.

    Behaves as any of ASE's own: results are float64 numpy arrays in eV, eV/Å and eV/Å^3, kept until
    the atoms change, with their ``info["charge"]`` and ``info["spin"]``. No gradient is recorded here: see
    `BPTTOptimizer.relaxation` and `ase_bptt.relax`.

    Parameters
    ----------
    potential : str, Path, module or Potential
        As for `load_potential`: there is no default. A module or Potential without dtype and device is used as it is.
    device : torch.device or str, optional
        By default the GPU where PyTorch finds one, else the CPU; a module that is given stays where it is.
    dtype : torch.dtype or str, optional
        Precision; None keeps the potential's.
    skin : float
        In Å: the neighbour list is rebuilt after an atom moved more than half of it.
    trust : bool
        Allow a native checkpoint, which is a pickle and can run any code.
    **kwargs
        ASE's own: atoms, directory, label, restart.

    Raises
    ------
    TypeError
        Without a potential, and for keywords that are not known, with the nearest; for those of the families' own
        calculators, such as MACECalculator, with the one that does the same here.

    Attributes
    ----------
    potential : Potential
        May be set, to what the constructor takes. Its ``requires_grad`` flags are yours, and are never
        touched. ASE cannot see it when weights change, so results are also dropped whenever a weight or a
        buffer has been changed, in whatever way.

    Examples
    --------
    >>> from ase.build import molecule
    >>> atoms = molecule("N2")
    >>> atoms.calc = TorchCalculator("emt")
    >>> print(f"{atoms.get_potential_energy():.3f} eV")
    0.549 eV
    """

    implemented_properties = [*BASIC, "energies", "stresses", "magmoms"]  # noqa: RUF012 (ASE's contract)
    nolabel = True

    def __init__(
        self,
        potential: str | Path | nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        skin: float = 0.5,
        trust: bool = False,
        **kwargs: Any,
    ):
        _check_keywords(kwargs)
        if potential is None:
            raise TypeError(
                "TorchCalculator needs a potential: give the name of one ('chgnet', 'mace:medium'), a folder of ours, "
                "a native checkpoint with trust=True, or a module."
            )
        super().__init__(**kwargs)
        self._use(as_potential(potential, device=device, dtype=dtype, trust=trust), skin, potential)

    @property
    def potential(self) -> Potential:
        return self._potential

    @potential.setter
    def potential(self, potential: str | Path | nn.Module) -> None:
        self._use(as_potential(potential), self._skin, potential)

    def set(self, **changes: Any) -> dict[str, Any]:
        """Change what the calculator computes with: potential, device, dtype, skin (and trust, for a potential).

        A dtype or a device alone makes a copy of the potential, as in the constructor. Names that are not known are
        ignored with a warning.

        Returns
        -------
        dict
            What is other than before; results are dropped where there is any.
        """
        for name in sorted(changes.keys() - SETTABLE):
            said = f"TorchCalculator.set ignores {name!r}: it can change potential, device, dtype and skin."
            warnings.warn(said, stacklevel=2)
        # ASE's constructor comes here before there is anything to change.
        if not changes.keys() & SETTABLE:
            return {}
        before, old = self._described() | {"device": self.potential.device}, self.potential
        skin, given = changes.get("skin", before["skin"]), changes.get("potential", before["potential"])
        # The name that is there already means the potential that is there, whatever has been learnt since.
        potential = old if isinstance(given, str | Path) and str(given) == before["potential"] else given
        asked = {name: changes[name] for name in ("device", "dtype") if changes.get(name) is not None}
        potential = as_potential(potential, trust=changes.get("trust", False), **asked)
        if potential is old and skin == before["skin"]:
            return {}
        self._use(potential, skin, given)
        after = self._described() | {"device": self.potential.device}
        changed = {name: value for name, value in after.items() if value != before[name]}
        return changed if potential is old or changed else {"potential": after["potential"]}

    def _use(self, potential: Potential, skin: float, given: str | Path | nn.Module) -> None:
        """Compute with this potential, which was given by this name or module, from now on."""
        self._neighbors = NeighborList(potential.cutoff, skin)
        self._potential, self._skin = potential, skin
        self._given = str(given) if isinstance(given, str | Path) else potential.family
        basic = [name for name in BASIC if name != "stress" or potential.conservative]
        self.implemented_properties = [*basic, *potential.atomic_properties]
        self._calculated_with: Version = ()
        self._prepared: tuple[Potential, Atoms, Structures] | None = None
        self.parameters.update(self._described())
        self.reset()

    def _described(self) -> dict[str, Any]:
        """What goes into trajectories and databases: JSON only, the module stays out."""
        return {"potential": self._given, "dtype": _name(self.potential.dtype), "skin": self._skin}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; changed weights count as changed positions."""
        # ASE asks four times a step, and takes as long each time as a small cell's forces.
        if self.atoms is not None and same_but_positions(self.atoms, atoms):
            distance = np.abs(self.atoms.positions - atoms.positions).max(initial=0)
            if distance > 2 * tol:
                return ["positions"]
            changes = [] if distance == 0 else super().check_state(atoms, tol=tol)
        else:
            changes = super().check_state(atoms, tol=tol)
            # They stand in info, where ASE does not look.
            if self.atoms is not None and specified(self.atoms) != specified(atoms):
                changes = [*changes, "info"]
        if not changes and self._calculated_with != weights_version(self.potential):
            changes = ["positions"]
        return changes

    @outside_inference_mode
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results`, by one pass (two where stresses per atom are asked for)."""
        properties = properties or ["energy"]
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        periodic = atoms.cell.rank == 3
        if not periodic and {"stress", "stresses"} & set(properties):
            raise PropertyNotImplementedError("There is no stress without a three-dimensional cell.")
        if not np.isfinite(atoms.positions).all():
            raise CalculationFailed(f"A position of {atoms.symbols} is not a finite number.")
        structures = self._structures(atoms)
        edges = self._neighbors(structures)
        self._calculated_with = weights_version(self.potential)
        found = self.potential.results(structures, edges)
        arrays = {name: _numpy(value) for name, value in found.items()}
        energy = float(arrays["energy"][0])
        if not np.isfinite(energy):
            raise CalculationFailed(
                f"The potential gives the energy {energy} for {atoms.symbols}: are two atoms on one spot?"
            )
        # A well without a hard core has an energy where two atoms meet, but no gradient.
        if not np.isfinite(arrays["forces"]).all():
            raise CalculationFailed(
                f"The potential gives forces that are not finite for {atoms.symbols}: are two atoms on one spot?"
            )
        self.results = {"energy": energy, "free_energy": energy, "forces": arrays["forces"]}
        if periodic and "stress" in self.implemented_properties:
            self.results["stress"] = full_3x3_to_voigt_6_stress(arrays["stress"][0])
        if "energies" in self.implemented_properties:
            self.results["energies"] = arrays["atomic_energies"]
        if "magmoms" in self.implemented_properties:
            self.results["magmoms"] = arrays["magmoms"]
        if "stresses" in properties:
            stresses = _numpy(self.potential.stresses(structures, edges).detach())
            self.results["stresses"] = full_3x3_to_voigt_6_stress(stresses)

    def _structures(self, atoms: Atoms) -> Structures:
        """The atoms as tensors, and the elements checked; of the last ones where only positions have changed."""
        device, dtype = self.potential.device, self.potential.dtype
        if self._prepared is not None:
            potential, before, last = self._prepared
            x = last.positions
            as_before = potential is self.potential and x.device == device and x.dtype == dtype
            if as_before and same_but_positions(before, atoms):
                return last.replace(positions=torch.tensor(atoms.positions, device=device, dtype=dtype))
        structures = Structures.from_atoms(atoms, device=device, dtype=dtype)
        self.potential.check(structures)
        # The module may have been cast where it is.
        self.parameters.update(self._described())
        self._prepared = self.potential, atoms, structures
        return structures


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Raise TypeError for the first keyword that neither TorchCalculator nor ASE's Calculator knows."""
    ours, of_ase = keywords(TorchCalculator.__init__), keywords(Calculator.__init__)
    for name in given:
        if name not in of_ase:
            known = [*ours, *(name for name in of_ase if name != "ignore_bad_restart_file")]  # which is deprecated
            advice = {k: said for each in families() for k, said in family(each).foreign_keywords.items()}
            raise unknown_keyword("TorchCalculator", name, known, advice)


def same_but_positions(a: Atoms, b: Atoms) -> bool:
    """Whether two structures of one size are equal to the last bit, positions apart, in all that ASE compares, charge
    and spin.

    False says nothing: ASE compares less, and with a tolerance.
    """
    if len(a) != len(b) or a.arrays.keys() != b.arrays.keys():
        return False
    if not ((a.cell.array == b.cell.array).all() and (a.pbc == b.pbc).all()) or specified(a) != specified(b):
        return False
    return all(np.array_equal(value, b.arrays[name]) for name, value in a.arrays.items() if name != "positions")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().double().numpy())


NAME = "torchcalculator"
"""For `ase.calculators.calculator.get_calculator_class` and ``ase run``."""


def register() -> None:
    """Make TorchCalculator known to ASE by name, in this process; ASE offers no registration that lasts."""
    if NAME not in external_calculators:
        register_calculator_class(NAME, TorchCalculator)
