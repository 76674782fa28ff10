"""Tables and pictures."""

import csv
import math

import numpy as np
import pytest
from ase import Atoms
from matplotlib.collections import PathCollection
from matplotlib.image import imread

from ase_bptt.evaluation import Evaluation, Row
from ase_bptt.evaluation.compare import compare
from ase_bptt.report import change, shorten, symmetry
from ase_bptt.report.page import write_page
from ase_bptt.report.plots import atom_displacements, before_after, by_group, learning_curve, save
from ase_bptt.report.tables import comparison_text, evaluation_table, group_table, table, write_csv


def row(id: str, delta_q: float, **changes) -> Row:
    given = {
        "id": id, "group": "kind", "unrelaxed": delta_q + 1, "delta_q": delta_q, "rmsd": delta_q / 5,
        "max_displacement": delta_q / 2, "right_basin": delta_q < 2, "reference_moves": 0.01, "residual_force": 0.25,
        "space_group": "P1 (1)", "reference_space_group": "P1 (1)", "status": "converged", "nsteps": 12,
        "displacements": (delta_q / 2, delta_q / 4),
    }  # fmt: skip
    return Row(**given | changes)


def evaluation(distances, groups=None, **changes) -> Evaluation:
    groups = groups or ["kind"] * len(distances)
    rows = [row(f"defect_{k:02}", q, group=g, **changes) for k, (q, g) in enumerate(zip(distances, groups))]
    return Evaluation(tuple(rows))


BEFORE, AFTER = evaluation([4.0, 2.0, 3.0]), evaluation([1.0, 1.5, 2.0])
OTHERS = Evaluation(tuple(row(f"other_{k}", 1.0) for k in range(3)))


def cells(text: str, first: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(first)).split()


class TestTableOfTwo:
    text = table(BEFORE, AFTER)
    lines = text.splitlines()

    def test_there_is_a_row_for_each_structure_with_its_numbers_before_and_after(self):
        assert cells(self.text, "defect_00") == [
            "defect_00", "5.00", "4.00", "1.00", "0.800", "0.200", "2.000", "0.500", "no", "yes", "converged",
        ]  # fmt: skip
        assert sum(line.startswith("defect_") for line in self.lines) == 3

    def test_means_and_medians_follow_with_their_change(self):
        assert cells(self.text, "mean") == ["mean", "4.00", "3.00", "1.50", "50", "%", "lower"]
        assert cells(self.text, "median") == ["median", "3.00", "1.50", "50", "%", "lower"]

    def test_right_basins_are_counted(self):
        assert self.lines[-1] == "right basin: 0 of 3 before, 2 of 3 after"

    def test_units_stand_above_it(self):
        assert "amu^1/2 Å" in self.lines[0]

    def test_columns_stand_below_each_other(self):
        rows = [line for line in self.lines if line.startswith("defect_")]
        assert len({line.rindex("converged") for line in rows}) == 1
        # The columns of numbers end where their names end.
        names = self.lines[2]
        assert names.index("after") + len("after") == rows[0].index(" 1.00") + len(" 1.00")

    def test_labels_name_the_columns_and_long_ones_stand_above(self):
        assert "CHGNet  MACE" in table(BEFORE, AFTER, ("CHGNet", "MACE"))
        text = table(BEFORE, AFTER, ("the first potential", "the second potential"))
        assert "(1) the first potential; (2) the second potential" in text.splitlines()


class TestTableOfOne:
    found = Evaluation((
        row("a", 1.0, space_group="R3m (160)", reference_space_group="P-43m (215)"),
        row("b", 3.0, status="out of steps", nsteps=500),
    ))  # fmt: skip
    text = evaluation_table(found)

    def test_there_is_a_row_for_each_structure(self):
        assert cells(self.text, "a ") == [
            "a", "2.00", "1.00", "0.200", "0.500", "yes", "0.250", "lost:", "R3m", "12", "converged",
        ]  # fmt: skip
        assert cells(self.text, "b ") == [
            "b", "4.00", "3.00", "0.600", "1.500", "no", "0.250", "kept", "500", "out", "of", "steps",
        ]  # fmt: skip

    def test_a_summary_follows(self):
        assert cells(self.text, "mean") == ["mean", "3.00", "2.00"]
        assert cells(self.text, "median") == ["median", "2.00"]
        assert self.text.splitlines()[-1] == "right basin: 1 of 2; space group kept: 1 of 2"


@pytest.mark.parametrize("many", [False, True], ids=["short", "long"])
def test_tables_fit_a_terminal(many):
    tail = "/a_rather_long_name_of_a_folder/vasprun.xml" if many else ""
    found = Evaluation(tuple(
        row(f"data/{k}{tail}", 100.0, status="out of steps", nsteps=5000, reference_space_group="Fd-3m (227)")
        for k in range(3)
    ))  # fmt: skip
    text = "\n".join([evaluation_table(found), table(found, found), group_table(found, found)])
    assert max(map(len, text.splitlines())) <= 100
    assert "data" not in text


def test_a_structure_that_diverged_has_dashes_and_no_mean():
    diverged = Evaluation((row("a", 1.0), row("b", math.nan, status="diverged"), row("c", 2.0)))
    text = evaluation_table(diverged)
    assert cells(text, "b ") == ["b", "-", "-", "-", "-", "no", "0.250", "kept", "12", "diverged"]
    assert cells(text, "mean") == ["mean", "-", "-"]
    assert cells(text, "median") == ["median", "-"]


class TestGroups:
    before = evaluation([1, 3, 8.0], ["near", "near", "far"])
    after = evaluation([1, 1, 9.0], ["near", "near", "far"])

    def test_a_row_for_each_group_the_farthest_first(self):
        lines = group_table(self.before).splitlines()
        assert [line.split() for line in lines[-2:]] == [
            ["far", "1", "9.00", "8.00", "0", "of", "1"],
            ["near", "2", "3.00", "2.00", "1", "of", "2"],
        ]

    def test_two_evaluations_stand_side_by_side(self):
        assert cells(group_table(self.before, self.after), "near") == [
            "near", "2", "3.00", "2.00", "1.00", "50", "%", "lower", "1", "of", "2", "2", "of", "2",
        ]  # fmt: skip


@pytest.mark.parametrize("draw", [table, group_table, before_after, by_group, atom_displacements])
def test_other_structures_cannot_stand_side_by_side(draw):
    with pytest.raises(ValueError, match="same structures"):
        draw(BEFORE, OTHERS)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (2, 1, "50 % lower"), (1, 1.25, "25 % higher"), (0, 1, ""), (3, 2.04, "32 % lower"), (1, 1, "unchanged"),
        (1, 0.999, "less than 1 % lower"), (1, math.nan, ""), (1, 20, "20 times as high"),
    ],
)  # fmt: skip
def test_a_change_is_given_in_per_cent(before, after, said):
    assert change(before, after) == said


@pytest.mark.parametrize(
    ("end", "reference", "said"),
    [
        ("Fd-3m (227)", "Fd-3m (227)", "kept"), ("P1 (1)", "Fd-3m (227)", "lost: P1"), ("", "P1 (1)", "lost: none"),
        ("P-43m (215)", "P2 (3)", "other: P-43m"), ("R3m (160)", "P6 (168)", "other: R3m"), ("", "", "-"),
    ],
)  # fmt: skip
def test_symmetry_is_lost_only_where_there_is_less_of_it(end, reference, said):
    assert symmetry(row("a", 1.0, space_group=end, reference_space_group=reference)) == said


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/a/x", "runs/a/y"], ["x", "y"]),
        (["runs/a/x", "runs/b/y"], ["a/x", "b/y"]),
        (["runs/a"], ["runs/a"]),
        (["a_long_name_1", "a_long_name_2"], ["…g_name_1", "…g_name_2"]),
        (["first_OUTCAR_file", "second_OUTCAR_file"], ["first_OU…", "second_O…"]),
        (["same_1_and_longer", "same_2_and_longer"], ["same_1_a…", "same_2_a…"]),
        (["same_long_1_and_long", "same_long_2_and_long"], ["…1_and_long", "…2_and_long"]),
        ([], []),
    ],
)  # fmt: skip
def test_names_are_shortened_and_stay_distinct(names, short):
    assert shorten(names, 9) == short


class TestComparisonText:
    def test_it_tells_change_interval_test_and_basins(self):
        groups = [f"g{k}" for k in range(8)]
        before, after = evaluation([2.0] * 8, groups), evaluation([1.0] * 8, groups)
        text = comparison_text(compare(before, after), ("raw", "tuned"))
        assert text.splitlines()[0] == "From raw to tuned, over 8 structures in 8 groups:"
        assert "Mean Delta-Q: 50 % lower (95 % interval -50 to -50 %)" in text
        assert "over 8 groups: p = 0.0078." in text
        assert "Better (by more than 1 % and 0.005 amu^1/2 Å): 8 of 8; worse: 0. Median over structures: 50 %" in text
        assert "8 won, 0 lost" in text

    @pytest.mark.parametrize(("groups", "least"), [(2, "0.5"), (5, "0.062"), (6, None)])
    def test_too_few_groups_for_the_test_are_reported(self, groups, least):
        names = [f"g{k}" for k in range(groups)]
        found = compare(evaluation([2.0] * groups, names), evaluation([1.0] * groups, names))
        text = " ".join(comparison_text(found).split())
        assert (f"cannot fall below {least}, whatever the change" in text) == (least is not None)
        assert found.p_value == pytest.approx(2 / 2**groups)

    def test_one_group_has_no_interval(self):
        text = comparison_text(compare(BEFORE, AFTER))
        assert "50 % lower (one group, so there is no interval)" in text
        assert "nan" not in text

    def test_an_interval_that_includes_no_change_is_reported(self):
        groups = [f"g{k}" for k in range(6)]
        found = compare(evaluation([1, 2, 3, 1, 2, 3.0], groups), evaluation([2, 1, 3, 1, 3, 2.0], groups))
        assert "includes no change" in " ".join(comparison_text(found).split())

    def test_its_lines_are_not_long(self):
        assert max(map(len, comparison_text(compare(BEFORE, AFTER)).splitlines())) <= 100


CELL_COLUMNS = (
    "volume_error", "cell_strain", "a_error", "b_error", "c_error", "alpha_error", "beta_error", "gamma_error",
    "scaled_rmsd",
)  # fmt: skip


class TestCellsThatMoved:
    def evaluation(self, sizes, **changes) -> Evaluation:
        moved = [
            row(f"crystal_{k}", 1.0, volume_error=x, cell_strain=abs(x) / 2, scaled_rmsd=x / 10, **changes,
                lattice_error=(x, x, -2 * x, 0.0, 0.0, 100 * x))
            for k, x in enumerate(sizes)
        ]  # fmt: skip
        return Evaluation((*moved, row("molecule", 3.0)))

    def test_one_evaluation_has_a_row_for_each_and_fixed_ones_stand_apart(self):
        lines = evaluation_table(self.evaluation([0.04, -0.02])).splitlines()
        start = next(k for k, line in enumerate(lines) if line.startswith("cells that moved"))
        assert lines[start:start + 4] == [
            "cells that moved (2): mean absolute volume error 3.00 %; median strain 0.0150",
            "  mean absolute error of a, b, c 0.040 Å; of the angles 1.00°; median RMSD / (V/n)^(1/3) 0.0010; in the "
            "reference's space group 2 of 2",
            "cell moved (2): mean Delta-Q 1.00; right basin 2 of 2",
            "cell fixed (1): mean Delta-Q 3.00; right basin 0 of 1",
        ]  # fmt: skip
        assert lines[-2].split() == [
            "crystal_0", "+4.00", "0.0200", "+0.040", "+0.040", "-0.080", "+0.00", "+0.00", "+4.00", "0.0040",
        ]  # fmt: skip

    def test_two_stand_side_by_side_in_text_and_sentences(self):
        before, after = self.evaluation([0.04, -0.02]), self.evaluation([0.01, -0.03])
        text = table(before, after)
        assert "volume error 3.00 % before, 2.00 % after" in text
        assert cells(text.partition("cell fixed")[2], "crystal_1")[:5] == [
            "crystal_1", "-2.00", "-3.00", "0.0100", "0.0150",
        ]  # fmt: skip
        said = " ".join(comparison_text(compare(before, after)).split())
        assert "Volume nearer the reference's (by more than 0.1 %): 1 of 2 whose cells moved; farther: 1." in said

    def test_the_csv_has_numbers(self, tmp_path):
        write_csv(tmp_path / "a.csv", self.evaluation([0.04]))
        first, second = TestCsv().read(tmp_path / "a.csv")
        assert [first[name] for name in CELL_COLUMNS[:3]] == ["0.04", "0.02", "0.04"]
        assert {second[name] for name in CELL_COLUMNS} == {""}

    def test_the_page_has_a_section_for_them(self, tmp_path):
        moved = self.evaluation([0.04, -0.02])
        for name, found in (("a", moved), ("b", BEFORE)):
            write_page(tmp_path / name, title="Crystals", evaluation=found, labels=("EMT", ""))
        with_cells, without = ((tmp_path / name).read_text(encoding="utf-8") for name in "ab")
        assert "Cells that moved, against the references&#39;" in with_cells
        assert "cell fixed (1)" in with_cells
        assert not any(word in without for word in ("olume error", "strain", "Cells"))

    def test_nothing_stands_about_cells_where_none_moved(self):
        for text in (evaluation_table(BEFORE), table(BEFORE, AFTER), comparison_text(compare(BEFORE, AFTER))):
            assert not any(word in text.lower() for word in ("volume", "strain", "cell"))

    def test_a_slab_has_no_volume_and_a_diverged_one_counts_as_worse(self):
        before = Evaluation((row("slab", 1.0, cell_strain=0.1), row("crystal", 1.0, cell_strain=0.1, volume_error=0.1)))
        after = Evaluation((before.rows[0], row("crystal", math.nan, cell_strain=math.nan, volume_error=math.nan)))
        assert before.volume_error == pytest.approx(0.1)
        found = compare(before, after)
        assert (found.cells, found.cells_better, found.cells_worse) == (2, 0, 1)


class TestCsv:
    def read(self, path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def test_of_one_evaluation(self, tmp_path):
        write_csv(tmp_path / "a.csv", BEFORE)
        first, *others = self.read(tmp_path / "a.csv")
        assert len(others) == 2
        assert first == {
            "id": "defect_00", "group": "kind", "reference_space_group": "P1 (1)", "delta_q_unrelaxed": "5.0",
            "delta_q": "4.0", "rmsd": "0.8", "max_displacement": "2.0", "right_basin": "False",
            "status": "converged", "residual_force": "0.25", "space_group": "P1 (1)", "nsteps": "12",
            **dict.fromkeys(CELL_COLUMNS, ""),
        }  # fmt: skip

    def test_of_two(self, tmp_path):
        write_csv(tmp_path / "a.csv", BEFORE, AFTER)
        first = self.read(tmp_path / "a.csv")[0]
        assert (first["delta_q_before"], first["delta_q_after"], first["delta_q_unrelaxed"]) == ("4.0", "1.0", "5.0")
        assert (first["right_basin_before"], first["right_basin_after"]) == ("False", "True")

    def test_with_labels_and_names_that_need_quotes(self, tmp_path):
        found = Evaluation((row('a, "b"\nc', 1.0),))
        write_csv(tmp_path / "a.csv", found, found, ("old", "new"))
        (only,) = self.read(tmp_path / "a.csv")
        assert only["id"] == 'a, "b"\nc'
        assert {"delta_q_old", "delta_q_new"} <= set(only)

    def test_other_structures_leave_the_file_as_it_was(self, tmp_path):
        (tmp_path / "a.csv").write_text("old")
        with pytest.raises(ValueError, match="same structures"):
            write_csv(tmp_path / "a.csv", BEFORE, OTHERS)
        assert (tmp_path / "a.csv").read_text() == "old"


def points(axes) -> list[np.ndarray]:
    return [np.asarray(found.get_offsets()) for found in axes.collections if isinstance(found, PathCollection)]


class TestBeforeAndAfter:
    def test_every_structure_is_a_point_and_basins_have_marks_of_their_own(self):
        figure = before_after(BEFORE, AFTER, ("raw", "tuned"))
        (axes,) = figure.axes
        right, other = points(axes)
        np.testing.assert_allclose(right, [[4, 1], [2, 1.5]])
        np.testing.assert_allclose(other, [[3, 2]])
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "right basin (tuned)",
            "other basin (tuned)",
        ]
        assert axes.get_xlabel().startswith("Delta-Q raw (amu")
        assert axes.get_title() == "3 structures, geometric mean 50 % lower"

    @pytest.mark.parametrize(
        ("before", "after"),
        [([4.0, 2.0], [1.0, 1.5]), ([1.0], [4.0]), ([1.0], [0.0]), ([0.0], [0.0]), ([1e-9, 1e3], [5.0, 0.0])],
        ids=["better", "worse", "exact", "zero", "far"],
    )
    def test_every_point_lies_within(self, before, after):
        (axes,) = before_after(evaluation(before), evaluation(after)).axes
        low, high = axes.get_xlim()
        for found in points(axes):
            assert low < found.min()
            assert found.max() < high
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert len(shown) >= 2

    def test_one_that_diverged_is_left_out(self):
        figure = before_after(evaluation([1.0, 2.0]), evaluation([1.0, math.nan]))
        assert sum(map(len, points(figure.axes[0]))) == 1


class TestByGroup:
    before = evaluation([1, 3, 8.0], ["near", "near", "far"])

    def test_every_structure_is_a_point_in_the_line_of_its_group(self):
        (axes,) = by_group(self.before).axes
        structures, means = points(axes)
        np.testing.assert_allclose(structures, [[8, 0], [1, 1], [3, 1]])
        np.testing.assert_allclose(means, [[8, 0], [2, 1]])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["far", "near"]
        assert axes.yaxis_inverted()

    def test_two_evaluations_share_the_lines(self):
        figure = by_group(self.before, evaluation([1, 1, 4.0], ["near", "near", "far"]), ("raw", "tuned"))
        first, _, last, _ = points(figure.axes[0])
        np.testing.assert_allclose(first[:, 0], [8, 1, 3])
        np.testing.assert_allclose(last[:, 0], [4, 1, 1])
        assert (first[:, 1] < last[:, 1]).all()
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["raw", "tuned"]

    def test_of_many_groups_the_farthest_are_shown_and_the_title_says_so(self):
        figure = by_group(evaluation([float(k) for k in range(50)], [f"g{k}" for k in range(50)]))
        (axes,) = figure.axes
        assert points(axes)[0][:, 0].min() == 10
        assert axes.get_title() == "the farthest 40 of 50 groups"


class TestAtomDisplacements:
    def test_the_worst_structures_have_bars_for_their_atoms(self):
        figure = atom_displacements(evaluation([1, 4, 3, 2.0]))
        assert [axes.get_title(loc="left").split(",")[0] for axes in figure.axes] == [
            "defect_01",
            "defect_02",
            "defect_03",
        ]
        assert [bar.get_height() for bar in figure.axes[0].patches] == [2, 1]
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1"]

    def test_before_stands_beside_after_and_the_worst_are_those_after(self):
        figure = atom_displacements(BEFORE, evaluation([1.0, 3.0, 2.0]), most=1)
        (axes,) = figure.axes
        assert axes.get_title(loc="left") == "defect_01, Delta-Q 3.00"
        assert [bar.get_height() for bar in axes.patches] == [1, 0.5, 1.5, 0.75]
        assert axes.patches[0].get_x() < axes.patches[2].get_x() < axes.patches[1].get_x()

    @pytest.mark.parametrize("which", ["before", "after"])
    def test_elements_are_named_where_the_structures_are_there(self, which):
        known = Evaluation(BEFORE.rows, tuple(Atoms("SiP") for _ in range(3)))
        both = (known, AFTER) if which == "before" else (BEFORE, Evaluation(AFTER.rows, known.ends))
        axes = atom_displacements(*both).axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["Si\n0", "P\n1"]

    def test_of_many_atoms_the_farthest_are_shown_and_the_title_says_so(self):
        many = Evaluation((row("a", 1.0, displacements=tuple(k / 100 for k in range(64))),))
        (axes,) = atom_displacements(many).axes
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [k / 100 for k in range(63, 39, -1)]
        assert [text.get_text() for text in axes.texts] == ["24 farthest of 64 atoms"]
        assert axes.get_xticklabels()[0].get_text() == "63"


def history(scores, losses=None) -> list[dict[str, float]]:
    losses = losses or [2.0 / (k + 1) for k in range(len(scores))]
    return [
        {"epoch": k + 1, "train_loss": loss, "valid_score": score, "valid_delta_q": 2 * score, "gradient_norm": 1.0}
        for k, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]


class TestLearningCurve:
    def test_loss_and_validation_have_panels_of_their_own_over_the_same_epochs(self):
        upper, lower = learning_curve(history([3.0, 1.0, 2.0])).axes
        np.testing.assert_allclose(upper.lines[0].get_xydata(), [[1, 2], [2, 1], [3, 2 / 3]])
        np.testing.assert_allclose(lower.lines[0].get_xydata(), [[1, 6], [2, 2], [3, 4]])
        assert upper.get_xlim() == lower.get_xlim()
        assert "amu" in lower.get_ylabel()
        assert "amu" not in upper.get_ylabel()

    @pytest.mark.parametrize(("given", "marked"), [(None, (2, 2)), (3, (3, 4))])
    def test_the_best_epoch_is_marked(self, given, marked):
        upper, lower = learning_curve(history([3.0, 1.0, 2.0]), given).axes
        assert tuple(lower.lines[-1].get_xydata()[0]) == marked
        assert upper.get_title() == f"chosen: epoch {marked[0]}"

    def test_that_no_epoch_was_better_than_the_start_is_reported(self):
        upper, lower = learning_curve(history([3.0, 1.0]), 0).axes
        assert upper.get_title() == "no epoch was better than the untuned weights"
        assert len(lower.lines) == 1

    def test_without_validation_there_is_one_panel(self):
        (axes,) = learning_curve(history([math.nan, math.nan])).axes
        assert (len(axes.lines), axes.get_title(), axes.get_xlabel()) == (1, "", "epoch")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG")]
)
def test_pictures_are_written_in_the_format_of_their_name(tmp_path, name, start):
    save(by_group(BEFORE), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def is_a_picture(path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 300 and pixels.std() > 0.01


def test_both_pictures_of_a_run_are_written(tmp_path):
    save(before_after(BEFORE, AFTER), tmp_path / "a.png")
    save(learning_curve(history([1.0])), tmp_path / "b.png")
    assert is_a_picture(tmp_path / "a.png")
    assert is_a_picture(tmp_path / "b.png")


def test_pictures_leave_the_users_figures_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = (plt.get_fignums(), plt.get_backend())
    save(before_after(BEFORE, AFTER), tmp_path / "a.png")
    assert (plt.get_fignums(), plt.get_backend()) == before
