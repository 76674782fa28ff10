"""Comparisons of two evaluations against independent arithmetic."""

import json
import math
from itertools import product

import numpy as np
import pytest

from ase_bptt.evaluation import Evaluation, Row
from ase_bptt.evaluation.compare import compare


def evaluation(distances, groups, right=None) -> Evaluation:
    right = right or [True] * len(distances)
    return Evaluation(tuple(
        Row(id=str(k), group=group, unrelaxed=9.0, delta_q=float(q), rmsd=0.1, max_displacement=0.1, right_basin=basin,
            reference_moves=0.0, residual_force=0.0, space_group="", reference_space_group="", status="converged",
            nsteps=1, displacements=(0.1,))
        for k, (q, group, basin) in enumerate(zip(distances, groups, right, strict=True))
    ))  # fmt: skip


SIZES = (1, 4, 2, 3, 1, 5, 2, 2)
GROUPS = [f"g{k}" for k, size in enumerate(SIZES) for _ in range(size)]
RANDOM = np.random.default_rng(3)
FIRST = np.exp(RANDOM.normal(size=len(GROUPS)))
# What a group gains is its own, and all its members share it.
LAST = FIRST * np.exp(np.repeat(RANDOM.normal(-0.3, 0.5, size=len(SIZES)), SIZES))
BEFORE, AFTER = evaluation(FIRST, GROUPS), evaluation(LAST, GROUPS)


def numbers(found) -> list[float]:
    return [found.value, found.low, found.high]


def resampled(statistic, n: int = 4000) -> tuple[float, float]:
    """The central 95 % of a statistic over draws of whole groups with replacement."""
    random = np.random.default_rng(11)
    members = [np.array([k for k, g in enumerate(GROUPS) if g == group]) for group in sorted(set(GROUPS))]
    drawn = []
    for _ in range(n):
        rows = np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])
        drawn.append(statistic(FIRST[rows], LAST[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def of_means(first, last) -> float:
    return last.mean() / first.mean() - 1


def of_geometric_means(first, last) -> float:
    return math.exp(np.log(last).mean() - np.log(first).mean()) - 1


@pytest.mark.parametrize(
    ("name", "statistic"), [("mean", of_means), ("geometric_mean", of_geometric_means)], ids=["mean", "geometric"]
)
def test_changes_and_intervals_are_those_of_draws_of_whole_groups(name, statistic):
    found = getattr(compare(BEFORE, AFTER), name)
    assert found.value == pytest.approx(statistic(FIRST, LAST))
    low, high = resampled(statistic)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.06 * width)
    assert found.high == pytest.approx(high, abs=0.06 * width)


def signed_rank(differences) -> float:
    """Two-sided p of Wilcoxon's test, by all signs that there could have been."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    centre = ranks.sum() / 2
    reached = abs(ranks[np.array(differences) > 0].sum() - centre)
    signs = np.array(list(product((0, 1), repeat=len(ranks))))
    return float((np.abs(signs @ ranks - centre) >= reached - 1e-9).mean())


def test_the_test_is_wilcoxons_on_the_groups_mean_logarithms():
    ratios = np.log(LAST / FIRST)
    means = [ratios[[g == group for g in GROUPS]].mean() for group in sorted(set(GROUPS))]
    assert compare(BEFORE, AFTER).p_value == pytest.approx(signed_rank(means))


def test_structures_that_move_together_count_as_one():
    """Eight groups of four that gain alike tell as much as eight structures, not as 32."""
    gains = np.exp(np.random.default_rng(5).normal(-0.2, 0.6, size=8))
    grouped = [f"g{k}" for k in range(8) for _ in range(4)]
    alone = [str(k) for k in range(32)]
    first, last = np.ones(32), np.repeat(gains, 4)
    together = compare(evaluation(first, grouped), evaluation(last, grouped))
    apart = compare(evaluation(first, alone), evaluation(last, alone))
    assert together.mean.value == pytest.approx(apart.mean.value)
    for name in ("mean", "geometric_mean"):
        wide, narrow = (getattr(found, name) for found in (together, apart))
        # sqrt(4) of draws of a quarter as many.
        assert 1.6 < (wide.high - wide.low) / (narrow.high - narrow.low) < 2.4
    assert together.p_value > apart.p_value
    assert (together.groups, apart.groups) == (8, 32)


def test_swapped_the_change_is_the_inverse():
    one, other = compare(BEFORE, AFTER), compare(AFTER, BEFORE)
    for name in ("mean", "geometric_mean"):
        a, b = (1 + np.array(numbers(getattr(found, name))) for found in (one, other))
        # Low and high change places.
        np.testing.assert_allclose(a, 1 / b[[0, 2, 1]], rtol=1e-2)
    assert one.p_value == pytest.approx(other.p_value)
    assert (one.better, one.worse) == (other.worse, other.better)


def test_nothing_changed_between_two_that_are_identical():
    found = compare(BEFORE, BEFORE)
    assert numbers(found.mean) == [0, 0, 0]
    assert numbers(found.geometric_mean) == [0, 0, 0]
    assert (found.p_value, found.better, found.worse, found.basins_won, found.basins_lost) == (1, 0, 0, 0, 0)


def test_one_group_has_no_interval_and_prints_none():
    found = compare(evaluation([1, 3], "gg"), evaluation([1, 2], "gg"))
    assert found.groups == 1
    assert found.mean.value == pytest.approx(-0.25)
    assert math.isnan(found.mean.low)
    assert math.isnan(found.mean.high)
    assert str(found.mean) == "-25 %"


def test_an_interval_is_printed():
    assert str(compare(evaluation([2, 2], "ab"), evaluation([1, 1], "ab")).mean) == "-50 % [-50, -50]"


def test_structures_and_basins_are_counted():
    before = evaluation([1, 1, 1, 0.01], "abcd", [True, False, False, True])
    # The last two changed by less than 1 %, and by less than 0.005 amu^1/2 Å.
    after = evaluation([0.5, 1.02, 0.995, 0.006], "abcd", [False, True, True, True])
    found = compare(before, after)
    assert (found.n, found.better, found.worse, found.tied, found.improved) == (4, 1, 1, 2, 0.25)
    assert (found.basins_won, found.basins_lost) == (2, 1)
    assert found.median_improvement == pytest.approx((0.005 + 0.4) / 2)


@pytest.mark.parametrize(("factor", "harmful"), [(0.9, False), (1.0, False), (1.1, True)])
def test_harm_is_a_higher_geometric_mean(factor, harmful):
    assert compare(BEFORE, evaluation(FIRST * factor, GROUPS)).harmful == harmful


def test_a_summary_has_quartiles_and_a_geometric_mean():
    found = evaluation([1, 2, 4, 10], "abcd")
    assert found.geometric_mean == pytest.approx(80**0.25)
    assert found.quartiles == (1.75, 5.5)
    assert found.closer_than_start == 0.75  # all started at 9


@pytest.mark.parametrize(
    ("before", "after"),
    [([0, 0], [0, 0]), ([1, 0], [1, 0]), ([0, 1], [1, 0])],
)
def test_exact_matches_are_compared_quietly(before, after):
    found = compare(evaluation(before, "ab"), evaluation(after, "ab"))
    assert found.geometric_mean.value == pytest.approx(0)
    assert found.p_value == 1


def test_order_of_groups_does_not_matter():
    order = np.random.default_rng(0).permutation(len(GROUPS))
    names = [GROUPS[k] for k in order]
    found = compare(evaluation(FIRST[order], names), evaluation(LAST[order], names))
    expected = compare(BEFORE, AFTER)
    np.testing.assert_allclose(numbers(found.mean), numbers(expected.mean))
    assert found.p_value == pytest.approx(expected.p_value)


def test_the_seed_decides_the_draws():
    assert compare(BEFORE, AFTER, seed=1) == compare(BEFORE, AFTER, seed=1)
    assert compare(BEFORE, AFTER, seed=1).mean.low != compare(BEFORE, AFTER, seed=2).mean.low


@pytest.mark.parametrize("ids", [[1, 0], [0]], ids=["order", "number"])
def test_other_structures_cannot_be_compared(ids):
    after = Evaluation(tuple(AFTER.rows[k] for k in ids))
    with pytest.raises(ValueError, match="same structures in the same order"):
        compare(Evaluation(BEFORE.rows[:2]), after)


def test_it_can_be_written_as_json():
    found = json.loads(json.dumps(compare(BEFORE, AFTER).todict(), allow_nan=False))
    assert found["mean"].keys() == {"value", "low", "high"}
    assert found["n"] == len(GROUPS)


def test_a_structure_that_diverged_rose_and_is_left_out_of_the_rest():
    sound = compare(evaluation([1, 2, 4], "abc"), evaluation([0.5, 1, 3], "abc"))
    found = compare(evaluation([1, 2, 4, 3], "abcd"), evaluation([0.5, 1, 3, float("nan")], "abcd"))
    assert (found.n, found.groups, found.left_out, found.worse) == (4, 3, 1, sound.worse + 1)
    assert found.mean == sound.mean
    assert found.p_value == sound.p_value
