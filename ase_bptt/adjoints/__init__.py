"""How a relaxation is differentiated, apart from how it steps.

They differ in cost and in what the gradient knows: `FullTape` and `Replay` are exact, `Truncated` leaves out the first
frames, `Implicit` and `OneStep` need the end only, `Guided` takes the beginning and the end.

>>> from ase_bptt import adjoints
>>> list(adjoints.ADJOINTS)
['full', 'replay', 'truncated', 'implicit', 'one-step', 'guided']
"""

from __future__ import annotations

from typing import Any

from ..suggestions import unknown_name
from .adjoint import Adjoint, Attached, FullTape
from .guided import Guided
from .hessian_solve import Solve, SolveStatus
from .implicit import AtMinimum, GradientWarning, Implicit, OneStep
from .replay import Replay, Truncated

__all__ = [
    "ADJOINTS",
    "Adjoint",
    "AtMinimum",
    "Attached",
    "FullTape",
    "GradientWarning",
    "Guided",
    "Implicit",
    "OneStep",
    "Replay",
    "Solve",
    "SolveStatus",
    "Truncated",
    "make_adjoint",
]

ADJOINTS: dict[str, type[Adjoint]] = {cls.name: cls for cls in (FullTape, Replay, Truncated, Implicit, OneStep, Guided)}
FRAMES = {"replay": "every", "truncated": "window", "guided": "first"}
"""What the number after the colon means, as in "guided:20"."""
DIFFERENCES = "replay:differences"
"""The name of `Replay` by differences of the energy."""
NEEDED = {"truncated": 10, "guided": 10}
"""Frames of those that cannot be without a number."""


def make_adjoint(adjoint: str | dict[str, Any] | Adjoint | None) -> Adjoint | None:
    """An adjoint by name, as "replay", "replay:differences", "implicit" or "guided:20", in any case; from what its
    `todict` gave; or the object itself.

    Raises
    ------
    ValueError
        For names that there are not, with the nearest.

    Examples
    --------
    >>> make_adjoint("truncated:20")
    Truncated(window=20)
    """
    if adjoint is None or isinstance(adjoint, Adjoint):
        return adjoint
    if isinstance(adjoint, dict):
        settings = dict(adjoint)
        name = settings.pop("name", None)
        if name not in ADJOINTS:
            raise _unknown(name)
        return ADJOINTS[name](**settings)
    if not isinstance(adjoint, str):
        raise _unknown(adjoint)
    if adjoint.lower() == DIFFERENCES:
        return Replay(differences=True)
    name, colon, number = adjoint.lower().partition(":")
    wanted = FRAMES.get(name)
    if name not in ADJOINTS or (colon and not (wanted and number.isdecimal() and int(number))):
        raise _unknown(adjoint)
    frames = int(number) if number else NEEDED.get(name)
    return ADJOINTS[name](**{} if wanted is None or frames is None else {wanted: frames})


def _unknown(adjoint: Any) -> ValueError:
    known = [f"{known}:N" if known in FRAMES else known for known in ADJOINTS]
    return unknown_name("adjoint", adjoint, known, f", with N frames, and {DIFFERENCES}")
