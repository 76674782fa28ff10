"""The tutorials that run with ASE's classes and with ours: a difference between the two must show."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import ase.optimize
import numpy as np
import pytest
from ase.build import bulk

import ase_bptt.optimize
from ase_bptt import TorchCalculator

FOLDER = Path(__file__).resolve().parents[1] / "tutorials" / "ase"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("twice", "check"):
        sys.modules.pop(name, None)


@pytest.fixture
def twice(modules):
    return importlib.import_module("twice")


@pytest.fixture
def check(modules, monkeypatch, tmp_path):
    module = importlib.import_module("check")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_each_run_has_its_classes_and_a_folder(twice, capsys):
    given = []

    def run(EMT, optimize):
        given.append((EMT(), optimize))
        assert not list(Path().iterdir())
        Path("left.txt").touch()
        copper = bulk("Cu")
        copper.calc = given[-1][0]
        return {"energy (eV)": copper.get_potential_energy(), "steps": 3}

    home = Path.cwd()
    assert twice.compare(run) < 1e-12
    assert Path.cwd() == home
    (emt, optimize), (torch_emt, our_optimize) = given
    assert optimize is ase.optimize
    assert our_optimize is ase_bptt.optimize
    assert emt.name == "emt"
    assert isinstance(torch_emt, TorchCalculator)
    assert "2 numbers, largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1 + 2e-6, np.nan, np.inf])
def test_a_difference_is_named(twice, value):
    def run(EMT, optimize):
        return {"same": 1.0, "height (Å)": value if optimize is ase_bptt.optimize else 1.0}

    with pytest.raises(AssertionError, match=r"more than 1e-06: height \(Å\)\."):
        twice.compare(run)


def test_a_number_of_one_run_only_is_named(twice):
    def run(EMT, optimize):
        return {"both": 1.0} | ({"barrier": 1.0} if optimize is ase.optimize else {})

    with pytest.raises(AssertionError, match="Only one of the two runs found: barrier"):
        twice.compare(run)


@pytest.mark.parametrize(
    ("script", "code", "shown"),
    [
        ("print('4 numbers, largest difference 1e-12')", 0, "some_metal: 4 numbers, largest difference 1e-12, "),
        ("raise AssertionError('These differ')", 1, "These differ"),
        (
            "import warnings; warnings.warn_explicit('Old', UserWarning, 'f', 1, 'ase_bptt.optimize.bptt_optimizer')",
            1,
            "Old",
        ),
    ],
)
def test_check_says_what_differs(check, monkeypatch, tmp_path, capsys, script, code, shown):
    (tmp_path / "some_metal.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == code
    assert shown in capsys.readouterr().out
