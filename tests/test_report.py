"""Tables and pictures."""

import math

import pytest
from matplotlib.image import imread

from ase_bptt.evaluation import Evaluation, Row
from ase_bptt.report import change, plot_before_after, plot_learning_curve, table


def evaluation(distances, basins=None) -> Evaluation:
    basins = basins or [q < 2 for q in distances]
    return Evaluation(
        tuple(
            Row(f"defect_{k:02}", "kind", q, q / 5, q / 2, right, "converged", 10)
            for k, (q, right) in enumerate(zip(distances, basins, strict=True))
        )
    )


BEFORE, AFTER, START = evaluation([4.0, 2.0, 3.0]), evaluation([1.0, 1.5, 2.0]), [5.0, 6.0, 7.0]


class TestTable:
    lines = table(BEFORE, AFTER, START).splitlines()

    def test_there_is_a_row_for_each_structure_with_its_numbers_before_and_after(self):
        row = next(line for line in self.lines if line.startswith("defect_00")).split()
        assert row == [
            "defect_00",
            "5.00",
            "4.00",
            "1.00",
            "0.800",
            "0.200",
            "2.000",
            "0.500",
            "no",
            "yes",
            "converged",
        ]
        assert sum(line.startswith("defect_") for line in self.lines) == 3

    def test_means_and_medians_follow_with_their_change(self):
        mean = next(line for line in self.lines if line.startswith("mean"))
        median = next(line for line in self.lines if line.startswith("median"))
        assert mean.split() == ["mean", "6.00", "3.00", "1.50", "50", "%", "lower"]
        assert median.split() == ["median", "3.00", "1.50", "50", "%", "lower"]

    def test_right_basins_are_counted(self):
        assert self.lines[-1] == "right basins: 0 of 3 before, 2 after"

    def test_units_stand_in_its_head(self):
        assert "amu^1/2 Å" in self.lines[0]

    def test_columns_stand_below_each_other(self):
        rows = [line for line in self.lines if line.startswith("defect_")]
        assert len({line.rindex("converged") for line in rows}) == 1
        # The columns of numbers end where their names end.
        assert self.lines[1].index("after") + len("after") == rows[0].index(" 1.00") + len(" 1.00")


@pytest.mark.parametrize(
    ("before", "after", "said"), [(2, 1, "50 % lower"), (1, 1.25, "25 % higher"), (0, 1, ""), (3, 2.04, "32 % lower")]
)
def test_a_change_is_said_in_per_cent(before, after, said):
    assert change(before, after) == said


def is_a_picture(path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 300 and pixels.std() > 0.01


@pytest.mark.parametrize(
    ("before", "after"),
    [(BEFORE, AFTER), (AFTER, BEFORE), (evaluation([1.0]), evaluation([0.0])), (evaluation([0.0]), evaluation([0.0]))],
    ids=["better", "worse", "exact", "zero"],
)
def test_before_and_after_is_a_picture(tmp_path, before, after):
    plot_before_after(before, after, tmp_path / "a.png")
    assert is_a_picture(tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("valid", [1.0, math.nan], ids=["validated", "not-validated"])
@pytest.mark.parametrize("epochs", [1, 5])
def test_the_learning_curve_is_a_picture(tmp_path, epochs, valid):
    history = [{"epoch": k + 1, "train_loss": 2 / (k + 1), "valid_delta_q": valid} for k in range(epochs)]
    plot_learning_curve(history, tmp_path / "a.png")
    assert is_a_picture(tmp_path / "a.png")


def test_pictures_leave_the_users_figures_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = (plt.get_fignums(), plt.get_backend())
    plot_before_after(BEFORE, AFTER, tmp_path / "a.png")
    assert (plt.get_fignums(), plt.get_backend()) == before
