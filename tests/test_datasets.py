"""The embedded relaxations and potential, and that no fold leaks."""

import json
import pickle
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.potentials import needs_mace

from ase_bptt import load_potential
from ase_bptt.datasets import DEMO_FOLD, FOLDER, FOLDS, pbesol_crystals, si_defects
from ase_bptt.pairs import RESIDUAL
from ase_bptt.pairs.structure_matching import same_structure
from ase_bptt.potentials import EMBEDDED, require

SIDES = ("train", "valid", "test")


@pytest.fixture(scope="module")
def everything():
    return si_defects()


@pytest.fixture(scope="module")
def splits(everything):
    # The files are read once.
    with mock.patch("ase_bptt.datasets._grouped_by_kind", return_value=everything):
        return [{side: si_defects(side, fold=fold) for side in SIDES} for fold in range(FOLDS)]


every_fold = pytest.mark.parametrize("fold", range(FOLDS))


def ids(pairs) -> set[str]:
    return {p.id for p in pairs}


def test_there_are_92_relaxations_with_names_of_their_own(everything):
    assert len(everything) == len(ids(everything)) == 92
    assert ids(everything) == {path.stem for path in FOLDER.glob("*.extxyz")}
    assert {len(p.relaxed) for p in everything} <= {6, 7, 8, 9}


def test_each_reference_is_relaxed(everything):
    for pair in everything:
        assert np.linalg.norm(pair.relaxed.get_forces(), axis=1).max() <= RESIDUAL, pair.id


@every_fold
def test_no_kind_is_on_two_sides_of_a_fold(splits, fold):
    kinds = [{p.relaxed.info["kind"] for p in splits[fold][side]} for side in SIDES]
    groups = [{p.group for p in splits[fold][side]} for side in SIDES]
    for sets in (kinds, groups):
        assert all(sets)
        assert not any(a & b for a, b in combinations(sets, 2))


def test_no_final_structure_is_on_two_sides_of_any_fold(everything, splits):
    same = [(a.id, b.id) for a, b in combinations(everything, 2) if same_structure(a.relaxed, b.relaxed)]
    assert same
    for split in splits:
        side = {p.id: name for name in SIDES for p in split[name]}
        assert all(side[a] == side[b] for a, b in same)


@every_fold
def test_the_sides_of_a_fold_are_everything(everything, splits, fold):
    sizes = [len(splits[fold][side]) for side in SIDES]
    assert sum(sizes) == 92
    assert set().union(*(ids(splits[fold][side]) for side in SIDES)) == ids(everything)
    assert sizes[0] > max(sizes[1:])
    assert min(sizes) >= 5


def test_each_relaxation_is_tested_once_over_the_folds(everything, splits):
    tested = [p.id for split in splits for p in split["test"]]
    assert sorted(tested) == sorted(ids(everything))


def test_the_demos_fold_is_the_split_without_further_words(splits):
    assert ids(si_defects("test")) == ids(splits[DEMO_FOLD]["test"])


@pytest.mark.parametrize("split", ["validation", "", None])
def test_an_unknown_split_is_refused_with_those_there_are(split):
    with pytest.raises(ValueError, match=r"There is no split .*train, valid, test, all\."):
        si_defects(split)


@pytest.mark.parametrize("fold", [-1, 5, 0.5, "0"])
def test_an_unknown_fold_is_refused_with_those_there_are(fold):
    with pytest.raises(ValueError, match=r"There is no fold .* there are 0 to 4\."):
        si_defects("test", fold=fold)


class TestEmbeddedPotential:
    folder = Path(EMBEDDED["mace-si"])

    def test_it_is_small_and_holds_tensors_alone(self):
        assert sum(path.stat().st_size for path in self.folder.rglob("*")) <= 10e6
        weights = torch.load(self.folder / "weights.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        assert json.loads((self.folder / "model.json").read_text())["family"] == "mace"

    @needs_mace
    def test_it_loads_without_unpickling_and_knows_all_elements_of_the_pairs(self, everything):
        # e3nn's import reads its own constants.
        require("mace.modules", extra="mace")
        refused = AssertionError("this would run code from a file")
        real = torch.load

        def careful(*args, weights_only=False, **kwargs):
            if not weights_only:
                raise refused
            return real(*args, weights_only=True, **kwargs)

        with mock.patch("torch.load", careful), mock.patch.object(pickle, "load", side_effect=refused):
            potential = load_potential("mace-si")
        assert {int(z) for p in everything for z in p.initial.numbers} <= potential.atomic_numbers
        assert all(p.requires_grad for p in potential.parameters())


def test_no_compound_of_the_crystals_is_on_two_sides_of_a_fold():
    every = pbesol_crystals()
    assert len(every) == len(ids(every)) == 45
    with mock.patch("ase_bptt.datasets.read_pairs", return_value=every):
        for fold in range(FOLDS):
            sides = [pbesol_crystals(side, fold=fold) for side in SIDES]
            assert sum(map(len, sides)) == 45
            elements = [{frozenset(p.relaxed.get_chemical_symbols()) for p in side} for side in sides]
            assert not any(a & b for a, b in combinations(elements, 2))
    assert all(p.freedom.name == "full" and "stress" in p.relaxed.calc.results for p in every)
