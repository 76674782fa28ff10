"""The before-and-after card: what a potential has kept of what it knew, in words, as a picture and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..evaluation import Evaluation
from ..pairs import RelaxationPair
from ..potential import Potential
from ..report.cards import card_figure, card_section, card_text
from ..report.foldcards import fold_figure, fold_section
from ..report.page import Section
from .changes import Changes
from .folds import FoldChanges
from .portrait import portrait


class Card(Changes):
    """`Changes` that can be shown."""

    def text(self) -> str:
        """Tables and sentences, at most 80 columns wide."""
        return card_text(self)

    def figure(self) -> Figure:
        """Drift of the forces, lattice constants, and dimers; `report.save` writes it."""
        return card_figure(self)

    def section(self) -> Section:
        """A part of the HTML page."""
        return card_section(self)


class FoldCards(FoldChanges):
    """`FoldChanges` that can be shown."""

    def figure(self) -> Figure:
        """Drift of the forces, of each fold and in the mean."""
        return fold_figure(self)

    def section(self) -> Section:
        """A part of the HTML page."""
        return fold_section(self)


def card(
    before: Potential,
    after: Potential,
    pairs: Sequence[RelaxationPair] = (),
    *,
    held_out: tuple[Evaluation, Evaluation] | None = None,
    size: int = 24,
) -> Card:
    """Compare two potentials.

    Parameters
    ----------
    before, after : Potential
        Of the same elements, the pretrained one first.
    pairs : sequence of RelaxationPair
        As for `portrait`; best held-out ones.
    held_out : two Evaluations, optional
        Of the same held-out pairs by each.
    size : int
        Probes of each kind.
    """
    return Card(portrait(before, pairs, size=size), portrait(after, pairs, size=size), held_out)
