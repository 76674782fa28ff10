"""What all pictures share: their width, their colours, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..files import replacing

BLUE, ORANGE, GREY = "#1f5f99", "#d9762b", "#949494"
"""Told apart by eyes of all kinds and in grey print; what they mean is also said by shape or place."""
WIDTH = 4.8
"""Inches: at 480 pixels the type is as large as it is meant to be."""
DPI = 200
UNIT = "amu$^{1/2}$ Å"
"""Of Delta-Q."""


def new_figure(height: float) -> Figure:
    """An empty figure, so many inches high."""
    # Not pyplot: no window, no global state, no backend to choose.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_logarithms(axis: Axis, low: float, high: float) -> None:
    """Plain numbers, which do not run into each other, on an axis of logarithms from low to high."""
    steps = (1.0, 2.0, 5.0) if high / low < 500 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis of logarithms begins and ends around these values, at least a factor of four apart."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    margin = max(1.4, 2 * (low / high) ** 0.5)
    return low / margin, high * margin


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture, whole or not at all, in the format that its name ends in (.png, .svg, .pdf)."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=Path(path).suffix.removeprefix(".") or "png")


def png(figure: Figure) -> bytes:
    """The picture as a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()
