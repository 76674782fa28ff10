"""The pictures of the page, with what they say in words."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ..evaluation import Evaluation
from .curve import learning_curve
from .figures import png, save
from .plots import MOST_ATOMS, atom_displacements, before_after, by_group
from .tables import sorted_groups
from .words import LABELS, plural

CSS_WIDTH = 480


@dataclass(frozen=True)
class Picture:
    """A PNG in base64, its size in pixels of the page, and what it says in words."""

    data: str
    width: int
    height: int
    alt: str
    caption: str


def picture_of(figure: Figure, alt: str, caption: str) -> Picture:
    """A figure for the page, with what is said where it is not seen, and below it."""
    height = round(CSS_WIDTH * figure.get_figheight() / figure.get_figwidth())
    return Picture(b64encode(png(figure)).decode(), CSS_WIDTH, height, alt, caption)


def scatter(before: Evaluation, after: Evaluation, labels: tuple[str, str]) -> Picture:
    """Delta-Q after against before."""
    pairs = list(zip(before.rows, after.rows, strict=True))
    nearer = sum(a.delta_q < b.delta_q for b, a in pairs)
    alt = (
        f"Delta-Q {labels[1]} against Delta-Q {labels[0]}, both on axes of logarithms: {nearer} of "
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
    alt = f"Delta-Q of each structure by group, on an axis of logarithms; the farthest group is {worst}."
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
        f"How far each atom ends from its place in the reference, for the structures that are farthest from theirs. "
        f"One high bar: one atom sits elsewhere; bars alike: all are off a little. Of more than {MOST_ATOMS} atoms "
        "the farthest are shown. Each structure has its own scale."
    )
    return picture_of(figure, f"Bars of the displacement of each atom: {names}.", caption)


def learning(history: Sequence[dict[str, float]], best_epoch: int | None) -> Picture:
    """Loss and validation over the epochs."""
    alt = f"Training loss {_course(history, 'train_loss')} over {plural(len(history), 'epoch')}"
    caption = "The loss on the training structures; nothing was validated, so the last weights were kept."
    if any(math.isfinite(row["valid_delta_q"]) for row in history):
        alt += f"; validation Delta-Q {_course(history, 'valid_delta_q')}"
        unsure = "" if best_epoch else ", unless those before training were better"
        kept = f"The star marks the best epoch, whose weights were kept{unsure}."
        if best_epoch == 0:
            kept = "No epoch was better than the weights before training, which were kept."
        caption = (
            "Above, the loss on the training structures; below, mean Delta-Q of the validation structures, fully "
            f"relaxed. {kept} "
            "Epochs are judged by the mean of the logarithm of Delta-Q, so the best need not be the lowest point."
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
    return f"from {history[0][name]:.3g} to {history[-1][name]:.3g}"
