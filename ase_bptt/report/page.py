"""The HTML page of a run or an evaluation: its sections, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from ..evaluation import BASIN_RULE, Evaluation
from ..evaluation.compare import Comparison, check_same
from ..pairs import RelaxationPair
from . import LABELS, cell_lines, change, comparison_sentences, count, headline, number, plural
from .columns import NUMBER, Cell, Table
from .document import Picture, Section, picture_of, write_document
from .plots import MOST_ATOMS, atom_displacements, before_after, by_group, learning_curve, save
from .structure_pictures import structures_section
from .tables import UNIT, both_of, cells_table, groups_table, sorted_groups, structures_table

RULE = BASIN_RULE.removeprefix("right basin: ")
TERMS = (
    ("Delta-Q", "The distance of a relaxed structure from its reference, with each atom's displacement weighted by its "
     "mass: the square root of the sum of m |displacement|² over the atoms, in amu^1/2 Å. Zero where the two are the "
     "same. Drift of the whole structure is removed, and minimum images are used."),
    ("Start", "Delta-Q of the structure before it is relaxed: what no relaxation at all would give."),
    ("RMSD, largest displacement", "Root of the mean squared displacement of the atoms from the reference, and that of "
     "the atom that is farthest from it, in Å."),
    ("Right basin", RULE[0].upper() + RULE[1:] + ". It says whether the relaxation ended in the basin "
     "in which the potential puts the reference, not how accurate the minimum of that basin is."),
    ("Force at the reference", "The largest force that the potential finds on an atom of the reference structure, in "
     "eV/Å. For a potential that agreed with the reference calculation it would nearly vanish."),
    ("Space group", "Whether the relaxed structure has the space group of its reference. “lost” and its new "
     "space group: fewer rotations and reflections than the reference; “other”: a different group, but not fewer."),
    ("Frames", "Steps of the relaxation. Where it did not converge, its status stands below: out of steps, or "
     "diverged."),
    ("Group", "Similar structures, such as those of one kind of defect. They are not independent, so intervals and "
     "the test are over groups."),
    ("Change of forces", "Root mean square of the change of a force component; beside it, in per cent of the root mean "
     "square of the components before. The change of the energies includes constant shifts."),
    ("Short-range instability", "Two atoms must repel each other more strongly the nearer they come. Where the energy "
     "falls instead, atoms that come this close, in a hot or a poor structure, collapse onto each other."),
)  # fmt: skip
OF_CELLS = (
    ("Volume error, strain", "Of the relaxed cell against the reference's: V / V_ref - 1, and the norm of the "
     "Green-Lagrange strain, which Delta-Q counts as the displacement that it causes."),
    ("RMSD / (V/n)^1/3", "RMSD at the fractional coordinates of the reference's cell, over the cube root of its volume "
     "an atom: a number without a unit, by which crystals of different density compare."),
)  # fmt: skip


def write_page(
    path: str | Path,
    *,
    title: str,
    evaluation: Evaluation,
    after: Evaluation | None = None,
    labels: tuple[str, str] = LABELS,
    comparison: Comparison | None = None,
    history: Sequence[dict[str, float]] | None = None,
    facts: Iterable[tuple[str, str]] = (),
    best_epoch: int | None = None,
    extra: Sequence[Section] = (),
    pairs: Sequence[RelaxationPair] = (),
) -> None:
    """Write a self-contained page that opens in any browser, whole or not at all.

    Parameters
    ----------
    path : path of the HTML file
    title : str
    evaluation : Evaluation
        The only one, or that before.
    after : Evaluation, optional
        Of the same structures.
    labels : two str
        What the two are called.
    comparison : Comparison, optional
        Of the two, in words.
    history : sequence of dict, optional
        Of the training, as for `learning_curve`; best_epoch too.
    facts : pairs of str
        Names and values: potential, settings, versions, command, date, ...
    extra : sequence of Section
        Further sections at the end, such as `report.drift_report.drift_section`.
    pairs : sequence of RelaxationPair
        What was evaluated, for pictures of the best and the farthest structures; without them, or without the ends of
        the evaluation, there are none.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.

    Examples
    --------
    >>> import tempfile
    >>> from ase.build import molecule
    >>> from ase_bptt import RelaxationPair, evaluate, load_potential
    >>> found = evaluate(load_potential("emt"), [RelaxationPair(molecule("N2"), molecule("N2"), "N2")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page(Path(folder) / "report.html", title="N2 by EMT", evaluation=found, labels=("EMT", ""))
    ...     "N2 by EMT" in (Path(folder) / "report.html").read_text()
    True
    """
    if after is not None:
        check_same(evaluation, after)
    chosen = list(facts)
    sections = [Section("How it was made", tables=[facts_table(chosen)])] if chosen else []
    sections += _results(evaluation, after, labels, comparison)
    if drawn := structures_section(evaluation, after, labels, pairs):
        sections.append(drawn)
    if history:
        sections.append(Section("Training", pictures=[learning(history, best_epoch)]))
    sections += extra
    write_document(path, title, headline(evaluation, after, labels, UNIT), sections,
                   TERMS + OF_CELLS * evaluation.cells_move)  # fmt: skip


def _results(
    evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str], comparison: Comparison | None
) -> list[Section]:
    pictures = [scatter(evaluation, after, labels)] if after is not None else []
    found = [Section("Summary", tables=[summary_table(evaluation, after, labels)], pictures=pictures)]
    if comparison is not None:
        found.append(Section("Is it more than chance?", comparison_sentences(comparison, labels)))
    groups = [groups_table(evaluation, after, labels)]
    structures = [structures_table(evaluation, after, labels)]
    if evaluation.cells_move:
        lines = cell_lines(both_of(evaluation, after), labels if after is not None else ("",))
        found.append(Section("Cells", lines, tables=[cells_table(evaluation, after, labels)]))
    return [
        *found,
        Section("By group", tables=groups, pictures=[dots(evaluation, after, labels)]),
        Section("Each structure", tables=structures, pictures=[bars(evaluation, after, labels)]),
    ]


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values."""
    return Table("Potential, settings, versions", [], [[Cell(name), Cell(value)] for name, value in facts], "facts")


def summary_table(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Table:
    """A measure a row; the values of one or two evaluations and the change."""
    both = both_of(evaluation, after)
    measures: list[tuple[str, Callable[[Evaluation], float], int]] = [
        (f"Mean Delta-Q ({UNIT})", lambda e: e.mean, 2),
        (f"Median Delta-Q ({UNIT})", lambda e: e.median, 2),
        ("Mean force at the reference (eV/Å)", lambda e: fmean(row.residual_force for row in e.rows), 3),
    ]
    rows = [[Cell(f"Mean Delta-Q of the starts ({UNIT})"),
             *(Cell(number(e.mean_unrelaxed, 2), NUMBER) for e in both), Cell("")]]  # fmt: skip
    for name, measure, digits in measures:
        values = [measure(e) for e in both]
        said = change(values[0], values[1]) if after is not None else ""
        rows.append([Cell(name), *(Cell(number(v, digits), NUMBER) for v in values), Cell(said)])
    counts: list[tuple[str, Callable[[Evaluation], str]]] = [
        ("In the right basin", lambda e: count(e, "basin")),
        ("Space group of the reference kept", lambda e: count(e, "symmetry")),
        ("Converged", lambda e: f"{sum(row.converged for row in e.rows)} of {len(e.rows)}"),
    ]
    rows += [[Cell(name), *(Cell(said(e), NUMBER) for e in both), Cell("")] for name, said in counts]
    if after is None:
        heads = [Cell("Measure"), Cell("Value", NUMBER)]
        rows = [row[:-1] for row in rows]
    else:
        heads = [Cell("Measure"), *(Cell(label, NUMBER) for label in labels), Cell("Change")]
    sizes = f"{plural(len(evaluation.rows), 'structure')} in {plural(len(evaluation.by_group()), 'group')}"
    return Table(sizes, [heads], rows)


def scatter(before: Evaluation, after: Evaluation, labels: tuple[str, str]) -> Picture:
    """Delta-Q after against before."""
    pairs = list(zip(before.rows, after.rows, strict=True))
    nearer = sum(a.delta_q < b.delta_q for b, a in pairs)
    alt = (
        f"Delta-Q {labels[1]} against Delta-Q {labels[0]}, both on logarithmic axes: {nearer} of "
        f"{plural(len(pairs), 'point')} below the diagonal."
    )
    caption = (
        f"A point is a structure. On the line nothing changed; in the shaded part below it, “{labels[1]}” ends nearer "
        f"to the reference than “{labels[0]}”. A cross: “{labels[1]}” ends in another basin. The farthest are named."
    )
    return picture_of(before_after(before, after, labels), alt, caption)


def dots(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Picture:
    """Delta-Q by group."""
    worst = next(iter(sorted_groups(evaluation, after)))
    alt = f"Delta-Q of each structure by group, on a logarithmic axis; the farthest group is {worst}."
    colours = f" Grey squares: {labels[0]}; blue dots: {labels[1]}." if after is not None else ""
    caption = (
        f"A line is a group, the farthest on top; a point is a structure, a bar the mean of the group. Left is "
        f"nearer to the reference.{colours}"
    )
    return picture_of(by_group(evaluation, after, labels), alt, caption)


def bars(evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str]) -> Picture:
    """Displacements of the atoms of the worst structures."""
    figure = atom_displacements(evaluation, after, labels)
    names = "; ".join(axes.get_title(loc="left") for axes in figure.axes)
    caption = (
        "How far each atom ends from its place in the reference, for the structures that are farthest from theirs. "
        "One high bar: a single atom is misplaced; equal bars: all atoms are slightly off. Of more than "
        f"{MOST_ATOMS} atoms the farthest are shown. Each structure has its own scale."
    )
    return picture_of(figure, f"Bars of the displacement of each atom: {names}.", caption)


def learning(history: Sequence[dict[str, float]], best_epoch: int | None) -> Picture:
    """Loss and validation over the epochs."""
    epochs = sum(row["epoch"] > 0 for row in history)
    alt = f"Training loss {_course(history, 'train_loss')} over {plural(epochs, 'epoch')}"
    caption = "The loss on the training structures; nothing was validated, so the last weights were kept."
    if any(math.isfinite(row["valid_delta_q"]) for row in history):
        alt += f"; validation Delta-Q {_course(history, 'valid_delta_q')}"
        unsure = "" if best_epoch else ", unless the weights before training were better"
        kept = f"The star marks the epoch that was chosen{unsure}."
        if best_epoch == 0:
            kept = "No epoch was better than the weights before training, which were kept."
        caption = (
            "Above, the loss on the training structures; below, mean Delta-Q of the validation structures, fully "
            f"relaxed; epoch 0 is the untuned potential. {kept} "
            "Epochs are compared by the mean of the logarithm of Delta-Q, and the last is chosen that is worse than "
            "the best by no more than one standard error, so it need not be the lowest point."
        )
    return picture_of(learning_curve(history, best_epoch), f"{alt}.", caption)


def write_pictures(
    folder: Path,
    evaluation: Evaluation,
    after: Evaluation | None = None,
    labels: tuple[str, str] = LABELS,
    history: Sequence[dict[str, float]] | None = None,
    best_epoch: int | None = None,
) -> None:
    """The page's pictures as files: before_after.png, by_group.png, displacements.png, learning_curve.png."""
    figures = {"by_group": by_group(evaluation, after, labels)}
    figures["displacements"] = atom_displacements(evaluation, after, labels)
    if after is not None:
        figures["before_after"] = before_after(evaluation, after, labels)
    if history:
        figures["learning_curve"] = learning_curve(history, best_epoch)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")


def _course(history: Sequence[dict[str, float]], name: str) -> str:
    values = [row[name] for row in history if row["epoch"] > 0 or math.isfinite(row[name])]
    return f"from {values[0]:.3g} to {values[-1]:.3g}" if values else "not measured"
