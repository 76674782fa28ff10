"""The package as it is imported: what it offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ase_bptt


def test_import_loads_nothing_that_draws():
    code = "import sys, ase_bptt; print(sorted({'matplotlib', 'jinja2', 'ase_bptt.training'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ase_bptt.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ase_bptt, name) is not None
    assert name in dir(ase_bptt)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'relaxx'"):
        _ = ase_bptt.relaxx
