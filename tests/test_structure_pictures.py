"""Pictures of structures: what they show, and where there are none."""

import re
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from ase_bptt import RelaxationPair
from ase_bptt.evaluation import Evaluation
from ase_bptt.evaluation.row import row_of
from ase_bptt.iterated_map import Status
from ase_bptt.report.page import write_page
from ase_bptt.report.plots import png
from ase_bptt.report.structure_pictures import MOVED, overlay, shifts, structures_section, view_of
from ase_bptt.search import Minimum, Search
from ase_bptt.search.picture import write_search_page
from ase_bptt.throughput import Relaxed

NAME = "<b>runs</b>/$x$ & {}"


def crystal(shift: float = 0.0) -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.positions[3] += [shift, shift / 2, 0.0]
    return atoms


def evaluation(pairs: list[RelaxationPair], shift: float) -> Evaluation:
    ends = [crystal(shift * (k + 1)) for k in range(len(pairs))]
    rows = [row_of(p, Relaxed(e, Status.CONVERGED, 3), p.relaxed, 0.1) for p, e in zip(pairs, ends, strict=True)]
    return Evaluation(tuple(rows), tuple(ends))


@pytest.fixture(scope="module")
def pairs() -> list[RelaxationPair]:
    return [RelaxationPair(crystal(0.7), crystal(), NAME.format(k), "Si") for k in range(5)]


def test_the_picture_differs_where_an_atom_moves():
    still = np.zeros((8, 3))
    moved = still.copy()
    moved[3] = [0.5, 0.0, 0.0]
    pictures = [png(overlay(crystal(), still, {"after": end}, "Si")[0]) for end in (still, moved, still)]
    assert pictures[0] == pictures[2] != pictures[1]


@pytest.mark.parametrize("axis", range(3))
def test_the_view_shows_the_displacement(axis):
    moves = np.zeros((8, 3))
    moves[3, axis] = 0.5
    view = view_of(crystal(), [moves])
    assert np.linalg.norm(view(moves[3])) > 0.95 * 0.5
    assert view.axes @ view.axes.T == pytest.approx(np.eye(3), abs=1e-12)


def test_displacements_are_those_of_delta_q():
    end = crystal(0.4)
    end.positions += [1.0, 2.0, 3.0]
    end.wrap()
    assert np.linalg.norm(shifts(end, crystal()), axis=1).argmax() == 3
    assert (np.linalg.norm(shifts(end, crystal()), axis=1) > MOVED).sum() == 1


def test_a_page_holds_the_farthest_and_the_best_with_their_names_as_text(pairs, tmp_path):
    before, after = evaluation(pairs, 0.2), evaluation(pairs, 0.1)
    write_page(tmp_path / "with.html", title="Si", evaluation=before, after=after, pairs=pairs)
    write_page(tmp_path / "without.html", title="Si", evaluation=before, after=after)
    page, plain = ((tmp_path / name).read_text() for name in ("with.html", "without.html"))
    assert page.count("<img") == plain.count("<img") + 4
    assert "<b>" not in page
    captions = re.findall(r"<figcaption>(.*?, among .*?)</figcaption>", page)
    assert [caption.split(",")[0][-1] for caption in captions] == ["4", "3", "2", "1"]
    assert "fell most" in captions[-1]


def test_without_ends_or_pairs_there_are_no_pictures(pairs):
    found = evaluation(pairs, 0.2)
    assert structures_section(found, pairs=pairs).pictures
    assert structures_section(replace(found, ends=()), pairs=pairs) is None
    assert structures_section(found) is None
    assert structures_section(replace(found, ends=()), found, pairs=pairs).pictures


def test_the_lowest_minima_of_a_search_stand_side_by_side(tmp_path):
    given = crystal()
    given.info["structure"] = NAME.format(0)
    minima = [Minimum(crystal(0.3 * k), 0.1 * k, 0.1 * k, (k,), ("rattle",)) for k in range(5)]
    minima[1] = replace(minima[1], ways=("your own",))
    write_search_page(tmp_path / "report.html", [given], [Search(tuple(minima), 9)])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 2
    assert "<b>" not in page
    assert "0.300 eV above the lowest, found 1 of 9 times" in page
    assert "1 more are higher" not in page
    assert "One more is higher." in page


def test_a_search_without_minima_has_a_page(tmp_path):
    given = crystal()
    given.info["structure"] = "Si"
    write_search_page(tmp_path / "report.html", [given], [Search((), 3, unconverged=3)])
    assert (tmp_path / "report.html").read_text().count("<img") == 1
