"""How far ASE's own mechanisms reach: by name after import, and from ``ase run``."""

import os
import subprocess
import sys

import numpy as np
from ase.calculators.calculator import get_calculator_class
from ase.io import read, write
from helpers.potentials import needs_mace
from helpers.structures import silicon

from ase_bptt import TorchCalculator


def test_ase_finds_the_calculator_by_name_after_import():
    assert get_calculator_class("torchcalculator") is TorchCalculator


def test_importing_again_does_no_harm():
    """In a process of its own: a second class of the name would be left behind for the tests that follow."""
    code = (
        "import importlib, ase_bptt; from ase_bptt import calculator, TorchCalculator as first; "
        "importlib.reload(calculator).register(); "
        "from ase.calculators.calculator import get_calculator_class as found; "
        "print(found('torchcalculator') is ase_bptt.TorchCalculator is first)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@needs_mace
def test_ase_run_computes_and_relaxes_with_the_embedded_potential(tmp_path):
    write("start.extxyz", silicon())
    flags = ["-p", "potential=mace-si", "--modify", "import ase_bptt", "-o", "end.extxyz", "-f", "0.05"]
    done = subprocess.run(
        [sys.executable, "-m", "ase", "run", "torchcalculator", "start.extxyz", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    end = read("end.extxyz")
    twin = end.copy()
    twin.calc = TorchCalculator("mace-si")
    assert np.linalg.norm(end.get_forces(), axis=1).max() < 0.05
    np.testing.assert_allclose(end.get_potential_energy(), twin.get_potential_energy(), atol=1e-8)
    assert np.abs(end.positions - silicon().positions).max() > 0.05
