"""Run a tutorial twice, with ASE's classes and with those of ase_bptt, and compare what it finds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from types import ModuleType

import ase.optimize
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

import ase_bptt.optimize
from ase_bptt import TorchCalculator

TOLERANCE = 1e-6
"""In the unit of each number: eV, Å, GPa, K, ..., or steps."""

Factory = Callable[[], Calculator]
Tutorial = Callable[[Factory, ModuleType], dict[str, float]]


def compare(run: Tutorial) -> float:
    """Run the tutorial twice, print both columns, and return the largest difference.

    Parameters
    ----------
    run : callable
        Called with what makes a calculator and with a module of optimizers; returns numbers by name.

    Raises
    ------
    AssertionError
        If a number differs by more than `TOLERANCE`, is not finite, or was found by one run only.
    """
    began = time.monotonic()
    theirs = _in_a_folder(run, EMT, ase.optimize)
    turned = time.monotonic()
    ours = _in_a_folder(run, torch_emt, ase_bptt.optimize)
    ended = time.monotonic()
    if alone := sorted(theirs.keys() ^ ours.keys()):
        raise AssertionError(f"Only one of the two runs found: {', '.join(alone)}.")

    differences = {name: abs(theirs[name] - ours[name]) for name in theirs}
    width = max(map(len, theirs))
    print(f"{'':{width}} {'ase':>18} {'ase_bptt':>18} difference")
    for name, difference in differences.items():
        print(f"{name:{width}} {_text(theirs[name])} {_text(ours[name])} {difference:10.1e}")
    print(f"{'seconds':{width}} {turned - began:18.1f} {ended - turned:18.1f}")
    # Asked in this way, a number that is not finite is wrong, too.
    wrong = [name for name, difference in differences.items() if not difference <= TOLERANCE]
    if wrong:
        raise AssertionError(f"These differ by more than {TOLERANCE}: {', '.join(wrong)}.")
    largest = max(differences.values())
    print(f"{len(differences)} numbers, largest difference {largest:.1e}")
    return largest


def torch_emt() -> TorchCalculator:
    """A calculator of ase_bptt with the potential of ASE's EMT."""
    return TorchCalculator("emt")


def _in_a_folder(run: Tutorial, emt: Factory, optimize: ModuleType) -> dict[str, float]:
    """What the tutorial finds in an empty folder, so that neither run reads a file of the other."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return run(emt, optimize)
        finally:
            os.chdir(home)


def _text(value: float) -> str:
    return f"{value:18d}" if isinstance(value, int) else f"{value:18.9f}"
