"""A check of potentials, for authors of adapters: the properties that all code above a `Potential` relies on.

>>> from ase_bptt.testing import TOLERANCES
>>> sorted(str(dtype) for dtype in TOLERANCES)
['torch.float32', 'torch.float64']
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from numbers import Real

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator

from ..charges import charge_and_spin, info_of
from ..potential import Potential
from ..suggestions import unknown_name
from .case import TOLERANCES, Case, Failed, Measured, Report
from .checks import CHECKS, parity

__all__ = ["TOLERANCES", "Measured", "Report", "check_potential"]


def check_potential(
    potential: Potential,
    atoms: Atoms,
    *,
    calculator: Calculator | None = None,
    skip: Collection[str] = (),
    tolerances: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Report:
    """Check that a potential keeps the contract of `Potential` on a structure.

    Parameters
    ----------
    potential : Potential
        In the dtype and on the device in which it is to be checked. A copy of it is evaluated.
    atoms : Atoms
        Any structure that it knows the elements of; best without symmetry, so that forces do not
        vanish. Two to twenty atoms are enough. With a three-dimensional cell the stress is checked, too. Its charge
        and spin are those of ``info``.
    calculator : Calculator or None
        The family's own, to compare with: energy, forces, and stress, magmoms and atomic energies where both have them.
    skip : collection of str
        Checks to leave out: "graph", "shapes", "calls", "partition", "forces", "stress", "batch", "translation",
        "rotation", "permutation", "far atom", "gradient", "cells", "charge", "cutoff", "untouched".
    tolerances : mapping of str to float
        Own limits, by the name of a comparison as the report shows it ("batch forces") or by the
        kind of quantity ("forces"); the others are those of `TOLERANCES` for the dtype.
    seed : int
        Of the directions, rotations and permutations.

    Returns
    -------
    Report
        The largest error of each comparison; print it.

    Raises
    ------
    AssertionError
        At the first check that fails: what is wrong, by how much, and what to change.
    ValueError
        For an unknown check to skip.
    NotImplementedError
        For elements that the potential does not know.

    Examples
    --------
    >>> from ase import Atoms
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.testing import check_potential
    >>> report = check_potential(load_potential("lj"), Atoms("Ar3", [(0, 0, 0), (1.1, 0, 0), (0.3, 1.2, 0.1)]))
    >>> report["forces"] < 1e-6
    True
    """
    unknown = set(skip) - CHECKS.keys()
    if unknown:
        raise unknown_name("check", min(unknown), CHECKS)
    _check_declared(potential)
    report = Report(potential.family, str(potential.dtype).removeprefix("torch."), atoms.get_chemical_formula())
    twin = copy.deepcopy(potential).requires_grad_()
    # Constraints do not concern the potential, and changes of atoms.positions would obey them.
    info = info_of(*charge_and_spin(atoms))
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)
    exact = twin if twin.dtype is torch.float64 else copy.deepcopy(twin).double()
    case = Case(twin, exact, bare, np.random.default_rng(seed), tolerances or {}, report)
    twin.check(case.batch(bare)[0])
    for name, (check, remedy) in CHECKS.items():
        if name in skip:
            report.skipped[name] = "as asked"
            continue
        case.check, case.remedy = name, remedy
        try:
            check(case)
        except Failed:
            raise
        except Exception as error:
            # The messages of torch have many lines.
            first = next(iter(str(error).splitlines()), "")
            case.fail(f"it raised {type(error).__name__} ({first})")
    if calculator is None:
        report.skipped["parity"] = "no calculator was given"
    else:
        case.check, case.remedy = "parity", "compare units, reference energies, cutoff and dtype with the calculator's"
        parity(case, calculator)
    return report


def _check_declared(potential: Potential) -> None:
    """Raise AssertionError where a potential lacks what every check needs."""
    name, cutoff = type(potential).__name__, getattr(potential, "cutoff", None)
    if not isinstance(getattr(potential, "family", None), str):
        raise AssertionError(f"{name} has no family: name it in the class attribute `family`.")
    if not (isinstance(cutoff, Real) and 0 < float(cutoff) < math.inf):
        raise AssertionError(f"{name} has no cutoff: set the attribute `cutoff` to its radius in Å, a positive number.")
