"""Update rules: from positions and forces of one frame to the positions of the next.

They are pure and out of place, so that autograd can follow them, and hold nothing of a run: what
travels from frame to frame is in the State. The same code moves ASE's optimizer and the tape.

>>> from ase_bptt import steppers
>>> list(steppers.STEPPERS)
['gd', 'fire', 'bfgs', 'lbfgs']
"""

from __future__ import annotations

from typing import Any

from ..suggestions import named, unknown_keyword
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
    """A stepper by name ("gd", "fire", "bfgs", "lbfgs", in any case) with its hyperparameters, or the object itself.

    Parameters
    ----------
    stepper : str, Stepper or None
        None is FIRE.
    **hyperparameters
        Of a stepper that is named. Those of one that was learnt may be those of its `todict` beside those of its
        ``state_dict``.

    Raises
    ------
    ValueError
        For unknown names, with the nearest.
    TypeError
        For hyperparameters that the stepper does not have, with the nearest, or the stepper that has it.

    Examples
    --------
    >>> make_stepper("gd", step_size=0.02)
    GradientDescent(step_size=0.02, anneal=1.0, momentum=0.0, maxstep=0.2)
    """
    if isinstance(stepper, Stepper):
        if hyperparameters:
            raise TypeError(f"Set {', '.join(hyperparameters)} on the stepper object itself, not beside it.")
        return stepper
    rule = named(STEPPERS, stepper or "fire", "stepper")
    hyperparameters = gathered(hyperparameters)
    unknown = [name for name in hyperparameters if name not in rule.fields]
    if unknown:
        raise unknown_keyword(f"The stepper {rule.name!r}", unknown[0], rule.fields, belongs_to())
    return rule(**hyperparameters)


def belongs_to() -> dict[str, str]:
    """Of hyperparameters that not every stepper has: to which they belong."""
    every = dict.fromkeys(name for rule in STEPPERS.values() for name in rule.fields)
    owners = {name: [repr(rule.name) for rule in STEPPERS.values() if name in rule.fields] for name in every}
    return {name: f"it belongs to stepper={' or '.join(rules)}" for name, rules in owners.items()}
