"""The check for authors of adapters: passes what is sound (in test_potentials), and finds each single fault."""

import doctest
import sys
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from helpers.faulty_potentials import FAULTS, NeedsANeighbour, UnknownWithoutNeighbours
from helpers.potentials import lennard_jones
from helpers.structures import argon, cluster

from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.testing import check_potential


@pytest.mark.parametrize(("potential", "check", "word"), FAULTS, ids=[c.__name__ for c, *_ in FAULTS])
def test_each_fault_is_named_in_one_sentence(potential, check, word):
    with pytest.raises(AssertionError) as caught:
        check_potential(potential(), argon())
    message = str(caught.value)
    assert message.startswith(f"The check {check!r} of the lj potential on Ar4 failed")
    assert word in message
    assert message.count(". ") == 0
    assert "\n" not in message


def test_an_atom_without_neighbours_must_have_finite_energy_and_forces():
    # In the crystal's cell even a lone atom has its own images.
    with pytest.raises(AssertionError, match="'far atom'"):
        check_potential(NeedsANeighbour(), cluster(), skip=["batch"])


def test_a_lone_atom_whose_energy_is_unknown_is_no_match_for_itself():
    with pytest.raises(AssertionError, match=r"'far atom'.*its energy .* is nan"):
        check_potential(UnknownWithoutNeighbours(), cluster(), skip=["batch"])


@pytest.mark.parametrize("cutoff", [None, float("inf"), -1.0])
def test_a_cutoff_that_is_none_is_named(cutoff):
    potential = lennard_jones()
    potential.cutoff = cutoff
    with pytest.raises(AssertionError, match=r"LennardJones has no cutoff: set the attribute"):
        check_potential(potential, argon())


def test_a_class_without_a_family_is_named():
    class Nameless(LennardJones):
        family = None

    with pytest.raises(AssertionError, match=r"Nameless has no family: name it"):
        check_potential(Nameless(), argon())


def test_another_potential_than_the_calculators_is_found_by_parity():
    with pytest.raises(AssertionError, match=r"'parity'.*from what LennardJones gives"):
        check_potential(lennard_jones(), argon(), calculator=AseLennardJones(rc=2.5, ro=1.8, smooth=True))


def test_the_report_is_a_table_of_errors_and_of_what_was_left_out():
    report = check_potential(lennard_jones(), cluster(), skip=["rotation"])
    assert 0 < report["forces"] < report.measured["forces"].tolerance == 1e-6
    assert set(report.skipped) == {"rotation", "stress", "cells", "parity"}
    lines = str(report).splitlines()
    assert lines[0] == "lj in float64 on Ar6"
    assert any(line.startswith("  forces ") and line.endswith("(at most 1e-06 eV/Å)") for line in lines)
    assert any("left out: the structure has no volume" in line for line in lines)


def test_own_tolerances_hold_by_name_and_by_kind():
    with pytest.raises(AssertionError, match="allowed is 1e-30"):
        check_potential(lennard_jones(), argon(), tolerances={"derivative": 1e-30})
    with pytest.raises(AssertionError, match=r"'rotation'.*allowed is 1e-30"):
        check_potential(lennard_jones(), argon(), tolerances={"rotation forces": 1e-30})


def test_what_cannot_be_asked_for_is_named():
    with pytest.raises(ValueError, match="no check 'speed'; there are graph, shapes, calls"):
        check_potential(lennard_jones(), argon(), skip=["speed"])
    potential = lennard_jones()
    potential.atomic_numbers = frozenset({14})
    with pytest.raises(NotImplementedError, match="no parameters for Ar"):
        check_potential(potential, argon())


def test_the_potential_and_the_atoms_that_are_given_are_left_alone():
    potential, atoms = lennard_jones().requires_grad_(False), argon()
    before = [w.clone() for w in potential.parameters()]
    check_potential(potential, atoms)
    assert not any(w.requires_grad for w in potential.parameters())
    assert all(torch.equal(a, b) for a, b in zip(potential.parameters(), before, strict=True))
    assert atoms == argon()


def test_a_lone_atom_has_nothing_to_differentiate_and_passes():
    report = check_potential(lennard_jones(), Atoms("Ar"))
    assert report.skipped["gradient"] == "no atom of the structure has a neighbour"


def test_the_page_for_authors_runs(tmp_path, monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    example = docs / "examples" / "new_family.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 80
    page = (docs / "new_family.rst").read_text(encoding="utf-8")
    # As pip leaves a package with this entry point.
    info = tmp_path / "new_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: new_family\nVersion: 1.0\n")
    assert '[project.entry-points."ase_bptt.potentials"]\n   soft = "new_family:Soft"' in page
    (info / "entry_points.txt").write_text("[ase_bptt.potentials]\nsoft = new_family:Soft\n")
    for path in (tmp_path, example.parent):
        monkeypatch.syspath_prepend(path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    test = doctest.DocTestParser().get_doctest(page, {}, "new_family", None, 0)
    report: list[str] = []
    try:
        assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)
    finally:
        sys.modules.pop("new_family", None)
