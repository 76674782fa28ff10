"""One adapter a family of potentials; none imports another's packages."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType

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
