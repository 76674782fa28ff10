"""One adapter a family of potentials; none imports another's packages."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import a family's package, or say which extra brings it."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", 1)[0]
        raise ImportError(
            f"This potential needs the package {package!r}, which does not import here ({error}). "
            f'Install it with: pip install "ase_bptt[{extra}]"'
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep a family's greetings and import warnings from standard output, which belongs to the caller."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
