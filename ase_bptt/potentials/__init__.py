"""Families of potentials, one adapter a file: the registry, and the loading of their own packages and modules.

No adapter imports the packages of another. A family registers through the entry-point group `ase_bptt.potentials`.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..potential import Potential
from ..utils import UNREADABLE, in_short

E3NN = {"mace": "sevenn", "sevennet": "mace"}
"""Extras whose packages pin different releases of e3nn, with the other's package."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import a family's package, or say which extra brings it, and where it cannot go."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", 1)[0]
        # Nobody who has MACE alone needs to hear of it.
        apart = extra in E3NN and (extra == "sevennet" or importlib.util.find_spec(E3NN[extra]) is not None)
        where = ", in an environment of its own: MACE needs e3nn 0.4.4, SevenNet a newer one" if apart else ""
        raise ImportError(
            f"This potential needs the package {package!r}, which does not import here ({error}): "
            f'install it by pip install "ase_bptt[{extra}]"{where}.'
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep a family's greetings and import warnings from standard output, which belongs to the caller."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


GROUP = "ase_bptt.potentials"


def families() -> tuple[str, ...]:
    """Names of the registered families."""
    return tuple(sorted(entry_points(group=GROUP).names))


def family(name: str) -> type[Potential]:
    """The adapter of a family. Only its own module is imported."""
    (entry, *_) = entry_points(group=GROUP, name=name)
    return entry.load()


def from_checkpoint(path: Path, trust: bool) -> Potential:
    """A family's own checkpoint as a Potential; it is a pickle, and is not opened without trust."""
    if not trust:
        raise PermissionError(
            f"{path} is a pickle, and loading a pickle can run any code that somebody put into it. "
            "If you trust where it comes from, say so: trust=True, or --trust in the shell."
        )
    try:
        with quiet():
            native = torch.load(path, weights_only=False, map_location="cpu")
    except ImportError as error:
        raise ImportError(
            f"{path} needs a package that is not here ({error}): install its family, "
            'for MACE by pip install "ase_bptt[mace]" (with cuEquivariance "ase_bptt[cueq]"), '
            'for CHGNet by pip install "ase_bptt[chgnet]", for SevenNet, which is not to be beside MACE, by '
            'pip install "ase_bptt[sevennet]".'
        ) from error
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be unpickled ({in_short(error)}).") from error
    return from_native(native, str(path))


def from_native(native: Any, name: str) -> Potential:
    """A family's own module, or what its checkpoint holds, as a Potential; errors call it by the name."""
    for candidate in map(family, families()):
        if candidate.owns(native):
            potential = candidate.from_native(native)
            told = native.get("metadata") if isinstance(native, dict) else getattr(native, "metadata", None)
            potential.metadata = told if isinstance(told, dict) else {}
            return potential
    raise ValueError(
        f"No family of potentials knows what to do with {name} (a {type(native).__module__}."
        f"{type(native).__name__}); the families are {', '.join(families())}."
    )
