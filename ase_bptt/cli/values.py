"""What the words of the shell mean: each function takes one and returns its value, or says what it must be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from ase import units

from ..cells import CellFreedom
from ..pairs.charges import CHOICES
from ..suggestions import named
from ..utils import as_device


def count(text: str) -> int:
    """A whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """A whole number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 at least, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def device(text: str) -> torch.device:
    """A device that is here."""
    try:
        return as_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def one_of(what: str, names: Iterable[str]) -> Callable[[str], str]:
    """One of these names, in any case."""

    def parse(text: str) -> str:
        try:
            return named({name: name for name in names}, text, what)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def cell(text: str) -> str | tuple[int, ...]:
    """What of a cell is relaxed: a name, or a mask of six numbers with commas or spaces between."""
    words = text.replace(",", " ").split()
    if len(words) == 1:
        given: Any = text
    elif len(words) == 6 and {*words} <= {"0", "1"}:
        given = tuple(map(int, words))
    else:
        raise argparse.ArgumentTypeError(
            f"a mask is six ones and zeros with commas between, for xx,yy,zz,yz,xz,xy, as 1,1,0,0,0,1; got {text!r}"
        )
    try:
        CellFreedom.of(given)
    except (ValueError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return given


def pressure(text: str) -> float:
    """GPa, as eV/Å^3."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of GPa, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number of GPa, got {text}")
    return value * units.GPa


def charges(text: str) -> str | float:
    """A name, or a charge."""
    if text in CHOICES:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {', '.join(CHOICES)} or a charge as -1, got {text!r}") from None


def site(text: str) -> int | tuple[float, ...]:
    """The index of an atom, or a place."""
    try:
        return tuple(map(float, text.split(",", 2))) if text.count(",") == 2 else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be the index of an atom, or X,Y,Z in Å, got {text!r}") from None


def shard(text: str) -> tuple[int, int]:
    """Number of a process from 0, and how many there are, from I/N with I from 1."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, as 2/8, got {text!r}")
    return int(first) - 1, int(last)
