"""Update rules: from positions and forces of one frame to the positions of the next.

They are pure and out of place, so that autograd can follow them, and hold nothing of a run: what
travels from frame to frame is in the State. The same code moves ASE's optimizer and the tape.
"""

from __future__ import annotations

from typing import Any

from .fire import FIRE
from .gradient_descent import GradientDescent
from .hyperparameters import gathered
from .quasi_newton import BFGS, LBFGS
from .stepper import Learner, State, Stepper

__all__ = [
    "BFGS",
    "FIRE",
    "LBFGS",
    "STEPPERS",
    "GradientDescent",
    "Learner",
    "State",
    "Stepper",
    "make_stepper",
]

STEPPERS: dict[str, type[Stepper]] = {cls.name: cls for cls in (GradientDescent, FIRE, BFGS, LBFGS)}


def make_stepper(stepper: str | Stepper | None, **hyperparameters: Any) -> Stepper:
    """A stepper by name ("gd", "fire", "bfgs", "lbfgs") with its hyperparameters, or the object itself; None is FIRE.

    Those of a stepper that was learnt may be those of its `todict` beside those of its ``state_dict``.
    Raises TypeError for hyperparameters that the stepper does not have, ValueError for unknown names.
    """
    if isinstance(stepper, Stepper):
        if hyperparameters:
            raise TypeError(f"Set {', '.join(hyperparameters)} on the stepper object itself, not beside it.")
        return stepper
    name = stepper or "fire"
    if name not in STEPPERS:
        raise ValueError(f"There is no stepper {name!r}; there are {', '.join(STEPPERS)}.")
    hyperparameters = gathered(hyperparameters)
    unknown = set(hyperparameters) - set(STEPPERS[name].fields)
    if unknown:
        raise TypeError(f"The stepper {name!r} has no {', '.join(sorted(unknown))}.")
    return STEPPERS[name](**hyperparameters)
