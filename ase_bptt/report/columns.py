"""The columns of tables: what is known of each relaxed structure, for the terminal, the CSV and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..evaluation import Row
from . import NONE, Column, number, symmetry, yes

NUMBER, WORD, WRONG = "number", "", "wrong"
"""How a cell of the page is set."""


@dataclass(frozen=True)
class Cell:
    """Text, how it is set, small text below it; for heads also how many columns and rows it spans."""

    text: str
    kind: str = ""
    below: str = ""
    span: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Table:
    """A caption, rows of heads, rows of cells of which the first names the row, and a class."""

    caption: str
    heads: Sequence[Sequence[Cell]]
    rows: Sequence[Sequence[Cell]]
    kind: str = ""


@dataclass(frozen=True)
class Measure:
    """What is known of each relaxed structure: a column of the text, of the CSV and of the page.

    Attributes
    ----------
    key : str
        The attribute of `Row`, and the column's name in the CSV.
    column : Column
    text : callable
        The cell's text, from a row.
    kind : str
        How the cell is set on the page.
    good : callable
        False for rows whose cell is marked.
    below : callable
        Small text below the cell on the page.
    """

    key: str
    column: Column
    text: Callable[[Row], str]
    kind: str = NUMBER
    good: Callable[[Row], bool] = lambda row: True
    below: Callable[[Row], str] = lambda row: ""

    def cell(self, row: Row) -> Cell:
        """The cell on the page."""
        kind = self.kind if self.good(row) else f"{self.kind} {WRONG}".strip()
        return Cell(self.text(row), kind, self.below(row))


START = Measure("unrelaxed", Column("start", "Delta-Q", page="Start"), lambda row: number(row.unrelaxed, 2))
DISTANCES = (
    Measure("delta_q", Column("end", "Delta-Q", page="Delta-Q"), lambda row: number(row.delta_q, 2)),
    Measure("rmsd", Column("RMSD", page="RMSD (Å)"), lambda row: number(row.rmsd, 3)),
    Measure("max_displacement", Column("displ.", "max.", page="Largest displacement (Å)"),
            lambda row: number(row.max_displacement, 3)),
    Measure("right_basin", Column("basin", "right", page="Right basin"), lambda row: yes(row.right_basin), WORD,
            lambda row: row.right_basin),
)  # fmt: skip
STATUS = Measure("status", Column("status", align="<"), lambda row: row.status, WORD)
OTHERS = (
    Measure("residual_force", Column("at ref.", "force", page="Force at the reference (eV/Å)"),
            lambda row: number(row.residual_force, 3)),
    Measure("space_group", Column("group", "space", "<", page="Space group"), symmetry, WORD,
            lambda row: row.symmetry_kept),
    Measure("nsteps", Column("frames", page="Frames"), lambda row: str(row.nsteps), NUMBER,
            lambda row: row.converged, lambda row: "" if row.converged else row.status),
)  # fmt: skip


def volume_error(row: Row) -> str:
    """In per cent, with its sign."""
    error = row.volume_error
    return signed([100 * error], 2) if error is not None else ""


def lengths(row: Row) -> str:
    """Errors of a, b and c in Å; one where the three are equal."""
    return signed(row.lattice_error[:3], 3) if row.lattice_error else ""


def angles(row: Row) -> str:
    """Errors of alpha, beta and gamma in degrees; one where the three are equal."""
    return signed(row.lattice_error[3:], 2) if row.lattice_error else ""


def signed(values: Sequence[float], digits: int) -> str:
    """With so many decimals and their signs; one where all are equal."""
    said = [f"{value:+.{digits}f}" if math.isfinite(value) else NONE for value in values]
    return said[0] if len(set(said)) == 1 else " ".join(said)


OF_CELLS = (
    Measure("volume_error", Column("error, %", "volume", page="Volume error (%)"), volume_error),
    Measure("cell_strain", Column("strain", page="Strain"), lambda row: number(row.cell_strain, 4)),
    Measure("lengths", Column("a, b, c (Å)", "lattice parameters, errors", page="Errors of a, b, c (Å)"), lengths),
    Measure("angles", Column("angles (°)", "lattice parameters, errors", page="Errors of the angles (°)"), angles),
    Measure("scaled_rmsd", Column("(V/n)^1/3", "RMSD /", page="RMSD / (V/n)^1/3"),
            lambda row: number(row.scaled_rmsd, 4)),
)  # fmt: skip
"""Shown where cells moved alone."""
MEASURES = (*DISTANCES, STATUS, *OTHERS)
"""In the order of the CSV, which has numbers of cells after them. The page has no column for the status: it
stands below the frames."""
LATTICE = ("a", "b", "c", "alpha", "beta", "gamma")


def values_of_cell(row: Row) -> dict[str, float | None]:
    """What the CSV holds of a cell, by column: a share, Å, degrees; None where the cell is fixed."""
    errors = row.lattice_error or (None,) * len(LATTICE)
    return {
        "volume_error": row.volume_error,
        "cell_strain": row.cell_strain,
        **{f"{name}_error": error for name, error in zip(LATTICE, errors, strict=True)},
        "scaled_rmsd": row.scaled_rmsd,
    }
