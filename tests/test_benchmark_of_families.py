"""The benchmark of all families: its table grows from calls in several environments."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "families.py"


@pytest.fixture
def families(monkeypatch):
    spec = importlib.util.spec_from_file_location("families", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def cell(name, fold, seed, arguments):
        if name == "sevennet":
            raise ImportError("This potential needs the package 'sevenn'.")
        row = {"before": 2.0, "after": 1.0 + seed / 10, "basin_before": False, "basin_after": True}
        return {"rows": {"a": row}, "drift": {"all": 0.1}, "seconds": 60.0}

    monkeypatch.setattr(module, "cell", cell)
    return module


def called(families, monkeypatch, capsys, *arguments) -> dict[str, str]:
    """Rows of the table, by potential."""
    monkeypatch.setattr(sys, "argv", ["families.py", "--out", "cells", *arguments])
    families.main()
    table = capsys.readouterr().out.partition("cells are fold.seed")[2].splitlines()[2:]
    return {line.split()[0]: line for line in table}


def test_a_family_of_another_environment_is_left_empty_and_the_others_go_on(families, monkeypatch, capsys):
    rows = called(families, monkeypatch, capsys)
    assert list(rows) == families.POTENTIALS
    assert rows["sevennet"].split() == ["sevennet"]
    for name in families.POTENTIALS[:-1]:
        assert "0.0,0.1,0.2" in rows[name]
        assert "2.00 ->  1.10   -45 % [-50, -45, -40]" in rows[name]
    files = sorted(Path("cells").iterdir())
    assert len(files) == 12
    before = [json.loads(file.read_text()) for file in files]
    monkeypatch.setattr(families, "cell", lambda *_: pytest.fail("a cell that is there was run again"))
    assert called(families, monkeypatch, capsys, "--potentials", *families.POTENTIALS[:-1]) == rows
    assert [json.loads(file.read_text()) for file in files] == before


def test_what_is_asked_for_beside_the_five_has_a_row_too(families, monkeypatch, capsys):
    rows = called(families, monkeypatch, capsys, "--potentials", "mace:medium", "--seeds", "1")
    assert list(rows) == [*families.POTENTIALS, "mace:medium"]
    assert "-45 %" in rows["mace:medium"]
