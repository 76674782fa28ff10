"""A self-contained HTML page: its headings, tables and pictures, whatever they are of."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ..utils import replacing
from .columns import Table
from .plots import png

CSS_WIDTH = 480
"""Pixels: the width of a picture on the page."""


@dataclass(frozen=True)
class Section:
    """What stands below one heading of the page."""

    name: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG in base64, its size in pixels of the page, its alternative text and its caption."""

    data: str
    width: int
    height: int
    alt: str
    caption: str


def picture_of(figure: Figure, alt: str, caption: str) -> Picture:
    """A figure for the page, with its alternative text and caption."""
    height = round(CSS_WIDTH * figure.get_figheight() / figure.get_figwidth())
    return Picture(b64encode(png(figure)).decode(), CSS_WIDTH, height, alt, caption)


def write_document(
    path: str | Path, title: str, headline: str, sections: Sequence[Section], terms: Sequence[tuple[str, str]]
) -> None:
    """Write a page that opens in any browser and needs no other file, whole or not at all.

    Parameters
    ----------
    path : path of the HTML file
    title, headline : str
        The latter is the result in one sentence.
    sections : sequence of Section
    terms : sequence of two str
        What stands on the page, with what it means.
    """
    text = _template().render(title=title, headline=headline, sections=sections, terms=terms)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["typeset"] = _typeset
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def _typeset(text: str) -> Markup:
    """Escaped; the exponent of the unit raised, and no line break between a number and its unit."""
    text = text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" Å", "\N{NO-BREAK SPACE}Å")
    text = text.replace("eV/Å", "eV/\N{WORD JOINER}Å")
    return Markup(escape(text).replace("amu^1/2", Markup("amu<sup>1/2</sup>")))
