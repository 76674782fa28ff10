"""Which of two potentials relaxes my structures better? What an evaluation shows, and how reliable it is.

    python tutorials/04_reading_the_evaluation.py

Two potentials, the embedded mace-si and CHGNet 0.3.0, relax 15 silicon defects whose DFT structures are known.
Prints a row for each structure, the summary of each potential, the groups, and a comparison with intervals
and a paired test; writes it all as a page, comparison.html.
"""

from pathlib import Path

from ase_bptt import datasets, evaluate, load_potential
from ase_bptt.evaluation import BASIN_RULE
from ase_bptt.evaluation.compare import compare
from ase_bptt.report.page import write_page

NAMES = {
    "Al-S_nn2_21",
    "Al_i_20",
    "AsGe_ss_01",
    "Ga-Sn_nn2_20",
    "I_H_00",
    "I_T_02",
    "I_X_02",
    "P_s_00",
    "S-Se_nn2_22",
    "SV_01",
    "Sb-Te_nn1_20",
    "SnV_21",
    "V_00",
    "V_03",
    "crystal_02",
}
pairs = [pair for pair in datasets.si_defects() if pair.id in NAMES]
mace = evaluate(load_potential("mace-si"), pairs)
chgnet = evaluate(load_potential("chgnet", dtype="float64"), pairs)

# 1. One row a structure. Each potential relaxes from the initial structure (its end is what counts) and
#    once more from the DFT structure.
#      start     Delta-Q of the initial structure to the DFT structure, in amu^1/2 Å: what no relaxation at
#                all would give. Delta-Q is the root of the sum of mass times squared displacement.
#      Delta-Q   the same for the end.
#      rmsd      root mean square displacement of the end, in Å; max: of its farthest atom.
#      basin     whether the ends from the initial and from the DFT structure are one structure.
#      moves     displacement of the farthest atom when the potential relaxes the DFT structure itself, in Å.
#      force     the potential's largest force on an atom in the DFT structure, in eV/Å. For a perfect
#                potential it would be below the 0.03 eV/Å to which DFT relaxed.
#      group     space group of the end, beside that of the DFT structure.
#    Another basin with small moves (Al_i_20) is a wrong path: the potential has a minimum near the DFT
#    structure, and the relaxation reaches another one. The right basin with a large Delta-Q (SV_01) is the
#    right minimum at the wrong position.
print("mace-si\n                start  Delta-Q    rmsd     max  basin   moves   force   space group, DFT's")
for row in mace.rows:
    print(
        f"{row.id:14} {row.unrelaxed:6.2f}   {row.delta_q:6.2f}  {row.rmsd:6.3f}  {row.max_displacement:6.3f}"
        f"  {'right' if row.right_basin else 'other'}  {row.reference_moves:6.3f}  {row.residual_force:6.2f}"
        f"   {row.space_group}, {row.reference_space_group}"
    )
    assert row.rmsd <= row.max_displacement
    assert row.status == "converged"
print(BASIN_RULE)

# 2. Summaries. A few structures in distant basins dominate the mean; the median is the typical structure.
print(f"\nunrelaxed: mean {mace.mean_unrelaxed:.2f} amu^1/2 Å")
for name, evaluation in {"mace-si": mace, "CHGNet": chgnet}.items():
    print(f"{name:9}: mean {evaluation.mean:.2f}, median {evaluation.median:.2f}, right basins {evaluation.basins:.0%}")

# 3. Groups: structures of one kind are not independent, so what follows counts groups, not structures.
for name, group in mace.by_group().items():
    if len(group.rows) > 1:
        print(f"group {name}: {', '.join(row.id for row in group.rows)}, mean {group.mean:.2f}")

# 4. The comparison, from the first to the second, structure by structure. The intervals are from a bootstrap: groups
#    are drawn with replacement, 5000 times; an interval that contains zero means that the change is not significant. In
#    the geometric mean a change from 1.0 to 0.5 counts as much as one from 8 to 4. Wilcoxon's signed-rank test
#    gives the probability of so one-sided a result by chance alone.
found = compare(mace, chgnet)
print(f"\nCHGNet against mace-si, {found.n} structures in {found.groups} groups")
print(f"mean:           {found.mean}")
print(f"geometric mean: {found.geometric_mean}")
print(f"p-value:        {found.p_value:.2f}")
print(f"better: {found.better}, worse: {found.worse}, tied: {found.tied}")
print(f"basins won: {found.basins_won}, lost: {found.basins_lost}")

# 5. Why the mean changes so much and the geometric mean so little: the row that changed most. One structure
#    ended in a distant basin. It is a real failure, but of one structure.
_, one, other = max((b.delta_q - a.delta_q, a, b) for a, b in zip(mace.rows, chgnet.rows, strict=True))
print(f"{one.id}: {one.delta_q:.2f} by mace-si, {other.delta_q:.2f} by CHGNet")
rest = [(a.delta_q, b.delta_q) for a, b in zip(mace.rows, chgnet.rows, strict=True) if a.id != one.id]
means = [sum(column) / len(rest) for column in zip(*rest, strict=True)]
print(f"mean without it: {means[0]:.2f} by mace-si, {means[1]:.2f} by CHGNet")

# 6. All of this as one page for the browser, with tables and pictures; it needs no other file and no network.
write_page(
    "comparison.html",
    title="CHGNet against mace-si",
    evaluation=mace,
    after=chgnet,
    labels=("mace-si", "CHGNet"),
    comparison=found,
)
page = Path("comparison.html").read_text(encoding="utf-8")
print(f"comparison.html names {sum(row.id in page for row in mace.rows)} of {len(pairs)} structures")
assert "<script" not in page
assert 'src="http' not in page
assert found.geometric_mean.low < 0 < found.geometric_mean.high
assert found.p_value > 0.05
