"""One potential on one structure: how it is evaluated, and how its results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..neighbors import Edges, NeighborList
from ..potential import Potential
from ..structures import Structures

Results = dict[str, np.ndarray]
STEP = 1e-5
"""Of finite differences, in Å, of strain or relative to a weight: short, since some functions of angles are sharp."""

UNITS = {
    "energy": "eV/atom",
    "forces": "eV/Å",
    "stress": "eV/Å^3",
    "atomic_energies": "eV",
    "magmoms": "Bohr magnetons",
    "derivative": "eV/Å",
    "strain": "eV/Å^3",
    "gradient": "of the gradient's length",
    "cutoff": "eV",
    "parity energy": "eV/atom",
    "parity forces": "eV/Å",
    "parity stress": "eV/Å^3",
    "parity magmoms": "Bohr magnetons",
    "parity atomic_energies": "eV",
}
"""Each kind of quantity that is compared, with the unit of its error."""
TOLERANCES = {
    torch.float64: dict.fromkeys(UNITS, 1e-6) | {"gradient": 1e-5},
    torch.float32: dict.fromkeys(UNITS, 1e-4)
    | {"energy": 5e-6, "stress": 1e-5, "strain": 1e-5, "gradient": 1e-3, "parity energy": 5e-6, "parity stress": 1e-5},
}
"""Largest error of each kind by dtype; where a force, stress or moment is larger than 1, relative to the largest."""


class Failed(AssertionError):
    """Raised by a check that fails."""


@dataclass
class Case:
    """A potential on a structure, and the report that grows.

    Attributes
    ----------
    potential : Potential
        A copy, all its weights requiring gradients.
    exact : Potential
        The same in float64, for finite differences: those in float32 are noise.
    atoms : Atoms
    random : numpy.random.Generator
    tolerances : mapping of str to float
        The caller's own.
    report : Report
    check, remedy : str
        The check that runs now, and what to do where it fails.
    """

    potential: Potential
    exact: Potential
    atoms: Atoms
    random: np.random.Generator
    tolerances: Mapping[str, float]
    report: Report
    check: str = ""
    remedy: str = ""

    def batch(self, atoms: Atoms | Sequence[Atoms]) -> tuple[Structures, Edges]:
        """A batch and its edges, where the potential computes."""
        return _batch(self.potential, atoms)

    def exactly(self, atoms: Atoms) -> tuple[Structures, Edges]:
        """A batch and its edges, in float64."""
        return _batch(self.exact, atoms)

    def results(self, atoms: Atoms | Sequence[Atoms]) -> Results:
        """`Potential.results` as arrays."""
        return {name: array(value) for name, value in self.potential.results(*self.batch(atoms)).items()}

    def energy(self, atoms: Atoms) -> float:
        """Energy in eV, in float64."""
        with torch.no_grad():
            return float(self.exact(*self.exactly(atoms)).energy)

    def forces(self, atoms: Atoms) -> np.ndarray:
        """Forces in eV/Å, as a relaxation takes them, in float64."""
        return array(self.exact.energy_and_forces(*self.exactly(atoms))[1])

    def compare(self, found: Results, expected: Results, what: str, counts: Sequence[int]) -> None:
        """Compare what both have; energies count per atom of each structure."""
        for name in (n for n in UNITS if n in found and n in expected):
            with np.errstate(invalid="ignore"):
                difference = np.abs(found[name] - expected[name])
            # No volume, no stress: NaN in both.
            if name == "stress":
                difference[np.isnan(found[name]) & np.isnan(expected[name])] = 0.0
            if name == "energy":
                difference = difference / np.asarray(counts)
            # Rounding goes with what is rounded.
            size = 1.0 if name == "energy" else max(1.0, np.abs(expected[name]).max(initial=0.0))
            error = difference.max(initial=0.0) / size
            full = f"{self.check} {name}"
            self.measure(full, full if full in UNITS else name, error, f"its {name.replace('_', ' ')}", what)

    def measure(self, name: str, kind: str, error: float, quantity: str, what: str) -> None:
        """Note an error, and raise `Failed` where it is larger than allowed."""
        allowed = tolerance_of(name, kind, self.potential.dtype, self.tolerances)
        self.report.measured[name] = Measured(float(error), allowed, UNITS[kind])
        # Written so that NaN fails.
        if not error <= allowed:
            size = f"{error:.2g} {UNITS[kind]} (allowed is {allowed:.0e})"
            self.fail(f"the largest difference of {quantity} from {what} is {size}")

    def fail(self, what: str) -> NoReturn:
        """Raise `Failed` with the one sentence."""
        raise Failed(
            f"The check {self.check!r} of the {self.potential.family} potential on {self.report.structure} failed, "
            f"for {what}: {self.remedy}."
        )


def array(tensor: Tensor) -> np.ndarray:
    """A float64 array of a tensor."""
    return tensor.detach().double().cpu().numpy()


def _batch(potential: Potential, atoms: Atoms | Sequence[Atoms]) -> tuple[Structures, Edges]:
    structures = potential.batch(atoms)
    return structures, NeighborList(potential.cutoff, skin=0.0)(structures)


def derivative(function: Callable[[float], float]) -> float:
    """Derivative at zero by the central difference of fourth order."""
    before, left, right, after = (function(k * STEP) for k in (-2, -1, 1, 2))
    return (before - 8 * left + 8 * right - after) / (12 * STEP)


@dataclass(frozen=True)
class Measured:
    """One comparison: its largest error, in this unit, and what was allowed.

    >>> Measured(1e-9, 1e-6, "eV/Å").error
    1e-09
    """

    error: float
    tolerance: float
    unit: str


@dataclass
class Report:
    """What `check_potential` found; `print` shows it as a table.

    Attributes
    ----------
    family, dtype, structure : str
        What was checked, in which precision, on which structure.
    measured : dict of str to Measured
        By names such as "batch forces", in the order of the checks.
    skipped : dict of str to str
        Checks that were left out, and why.
    unreached : tuple of str
        Weights without influence on the forces of this structure.

    Examples
    --------
    >>> from ase_bptt.testing import Measured, Report
    >>> print(Report("lj", "float64", "Ar3", {"forces": Measured(1e-9, 1e-6, "eV/Å")}))
    lj in float64 on Ar3
      forces   1.0e-09  (at most 1e-06 eV/Å)
    """

    family: str
    dtype: str
    structure: str
    measured: dict[str, Measured] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        """The error of one comparison."""
        return self.measured[name].error

    def __str__(self) -> str:
        width = max(map(len, [*self.measured, *self.skipped]), default=0)
        lines = [f"{self.family} in {self.dtype} on {self.structure}"]
        lines += [
            f"  {name:{width}}  {m.error:8.1e}  (at most {m.tolerance:.0e} {m.unit})"
            for name, m in self.measured.items()
        ]
        lines += [f"  {name:{width}}  left out: {why}" for name, why in self.skipped.items()]
        if self.unreached:
            lines.append(f"  weights without influence on the forces: {len(self.unreached)}, as {self.unreached[0]}")
        return "\n".join(lines)


def tolerance_of(name: str, kind: str, dtype: torch.dtype, own: Mapping[str, float]) -> float:
    """What is allowed for a comparison: the caller's own, by its name or its kind, else the table's."""
    return own.get(name, own.get(kind, TOLERANCES[dtype][kind]))
