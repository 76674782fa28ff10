"""The hyperparameters of a stepper: one number, or one for each element or frame; each is fixed, or a Parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Ranges = dict[str, tuple[float, float | str]]

SMALLEST = 1e-6
"""What stands for more than zero where a number is learnt: it must stay where it still has a gradient."""


def hold(name: str, given: Any) -> Any:
    """A number as it is; numbers for each element (a mapping) or frame (a sequence) as a module.

    What is a Parameter among them is in the module's ``state_dict``, under the element's symbol or the frame's
    number; the others stay floats.

    Raises
    ------
    ValueError
        Where there is no number.
    TypeError
        Where a Parameter holds several.
    """
    if isinstance(given, Mapping | nn.ParameterDict):
        held: Any = nn.ParameterDict()
        for key, value in given.items():
            held[key] = _single(name, value)
    elif isinstance(given, Iterable) and not isinstance(given, str | nn.Parameter) and getattr(given, "ndim", 1) > 0:
        held = nn.ParameterList([_single(name, value) for value in given])
    else:
        return _single(name, given) if isinstance(given, nn.Parameter) else given
    if not len(held):
        raise ValueError(f"{name} has no number in it: give at least one.")
    return held


def _single(name: str, number: Any) -> float | nn.Parameter:
    if not isinstance(number, nn.Parameter):
        return float(number)
    if number.numel() != 1:
        raise TypeError(
            f"A Parameter in {name} holds one number, not {number.numel()}: give a list or dict of Parameters."
        )
    return number


def labelled(name: str, held: Any) -> dict[str, Any]:
    """Each number by its label: "step_size", or "step_size[Si]" and others, or "step_size[0]" and others.

    There is none where words stand for a number that is not known yet.
    """
    if isinstance(held, nn.ParameterDict):
        return {f"{name}[{key}]": number for key, number in held.items()}
    if isinstance(held, nn.ParameterList):
        return {f"{name}[{k}]": number for k, number in enumerate(held)}
    return {} if isinstance(held, str) else {name: held}


def learnt(held: Any) -> Any:
    """The same numbers, all of them Parameters that require gradients; those that are Parameters already stay so."""
    if isinstance(held, nn.ParameterDict):
        # A new module: its Parameters are in the order of its keys, whichever of them were Parameters before.
        found = nn.ParameterDict()
        for key, number in held.items():
            found[key] = learnt(number)
        return found
    if isinstance(held, nn.ParameterList):
        return nn.ParameterList([learnt(number) for number in held])
    if isinstance(held, nn.Parameter):
        return held.requires_grad_()
    return nn.Parameter(torch.tensor(float(held), dtype=torch.float64))


def plain(held: Any) -> Any:
    """Hyperparameters as JSON: a number, a dict or a list."""
    if isinstance(held, nn.ParameterDict):
        return {key: plain(number) for key, number in held.items()}
    if isinstance(held, nn.ParameterList):
        return [plain(number) for number in held]
    return held.item() if isinstance(held, Tensor) else held


def table(held: nn.ParameterDict | nn.ParameterList, like: Tensor) -> Tensor:
    """The numbers of a group as one tensor, attached to its Parameters."""
    values = held.values() if isinstance(held, nn.ParameterDict) else held
    return torch.stack([torch.as_tensor(number, dtype=like.dtype, device=like.device).reshape(()) for number in values])


def gathered(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by field, where some of a group come by their names in a ``state_dict`` ("step_size.Si", "step_size.0").

    Those that belong to no group stay as they are.
    """
    found = dict(numbers)
    for name in numbers:
        field, _, key = name.partition(".")
        group = found.get(field)
        if isinstance(group, Mapping) and key in group:
            found[field] = {**group, key: found.pop(name)}
        elif isinstance(group, Sequence) and key in map(str, range(len(group))):
            found[field] = [*group[: int(key)], found.pop(name), *group[int(key) + 1 :]]
    return found
