"""What a check of a potential measured, and how far it may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

UNITS = {
    "energy": "eV/atom",
    "forces": "eV/Å",
    "stress": "eV/Å^3",
    "atomic_energies": "eV",
    "magmoms": "Bohr magnetons",
    "slope": "eV/Å",
    "strain": "eV/Å^3",
    "gradient": "of the gradient's length",
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


@dataclass(frozen=True)
class Measured:
    """One comparison: its largest error, in this unit, and what was allowed."""

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
