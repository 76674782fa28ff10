"""One HTML page that tells a whole run: it needs no other file, no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from ..comparison import Comparison
from ..evaluation import BASIN_RULE, Evaluation
from ..files import replacing
from .pagetables import UNIT, Table, facts_table, groups_table, structures_table, summary_table
from .pictures import Picture, bars, dots, learning, scatter
from .words import LABELS, check_same, comparison_sentences, headline

RULE = BASIN_RULE.removeprefix("right basin: ")
TERMS = (
    ("Delta-Q", "The distance of a relaxed structure from its reference, with each atom's displacement weighted by its "
     "mass: the square root of the sum of m |displacement|² over the atoms, in amu^1/2 Å. Zero where the two are the "
     "same. Drift of the whole structure is left out and periodic images are minimal."),
    ("Start", "Delta-Q of the structure before it is relaxed: what doing nothing would give."),
    ("RMSD, largest displacement", "Root of the mean squared displacement of the atoms from the reference, and that of "
     "the atom that is farthest from it, in Å."),
    ("Right basin", RULE[0].upper() + RULE[1:] + ". It asks whether the relaxation fell into the hollow "
     "where the reference lies, not how well the potential knows the bottom of that hollow."),
    ("Force at the reference", "The largest force that the potential finds on an atom of the reference structure, in "
     "eV/Å. A potential that agreed with the reference calculation would find nearly none."),
    ("Space group", "Whether the relaxed structure has the space group of its reference. “lost” and its new "
     "space group: fewer rotations and reflections than the reference; “other”: a different group, but not fewer."),
    ("Frames", "Steps of the relaxation. Where it did not converge, how it ended is said below: out of steps, or "
     "diverged."),
    ("Group", "Structures that are alike, as those of one kind of defect. They are not independent, so intervals and "
     "the test are over groups."),
    ("Change of forces", "Of each component of the force on each atom, root mean square; beside it, in per cent of the "
     "root mean square of the components themselves. Energies change by a constant, too."),
    ("Hole", "Two atoms must repel each other the more the nearer they come. Where the energy falls instead, atoms "
     "that come so near in a hot or a bad structure fall into each other."),
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """What stands below one heading."""

    name: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


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
) -> None:
    """Write a page that opens in any browser, whole or not at all.

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
        What stands last, as the section of a `Card`.

    Raises
    ------
    ValueError
        Where the two are not of the same structures.
    """
    if after is not None:
        check_same(evaluation, after)
    chosen = list(facts)
    sections = [Section("How it was made", tables=[facts_table(chosen)])] if chosen else []
    sections += _results(evaluation, after, labels, comparison)
    if history:
        sections.append(Section("Training", pictures=[learning(history, best_epoch)]))
    sections += extra
    text = _template().render(title=title, headline=headline(evaluation, after, labels, UNIT), sections=sections,
                              terms=TERMS)  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["typeset"] = _typeset
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def _typeset(text: str) -> Markup:
    """Escaped; the exponent of the unit raised, and units not parted from their numbers."""
    text = text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" Å", "\N{NO-BREAK SPACE}Å")
    text = text.replace("eV/Å", "eV/\N{WORD JOINER}Å")
    return Markup(escape(text).replace("amu^1/2", Markup("amu<sup>1/2</sup>")))


def _results(
    evaluation: Evaluation, after: Evaluation | None, labels: tuple[str, str], comparison: Comparison | None
) -> list[Section]:
    pictures = [scatter(evaluation, after, labels)] if after is not None else []
    found = [Section("Summary", tables=[summary_table(evaluation, after, labels)], pictures=pictures)]
    if comparison is not None:
        found.append(Section("Is it more than chance?", comparison_sentences(comparison, labels)))
    groups = [groups_table(evaluation, after, labels)]
    structures = [structures_table(evaluation, after, labels)]
    return [
        *found,
        Section("By group", tables=groups, pictures=[dots(evaluation, after, labels)]),
        Section("Each structure", tables=structures, pictures=[bars(evaluation, after, labels)]),
    ]
