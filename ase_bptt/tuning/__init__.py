"""Which weights are trained: by name, by layer, at rates of their own, or by low-rank updates beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..potential import Potential
from ..steppers import Stepper
from ..utils import check_positive
from . import low_rank
from .low_rank import matching, plain

STEPPER_RATE = 0.01
"""How far a step of Adam moves a hyperparameter of the stepper, as a share of its value."""


class Count(NamedTuple):
    """How many numbers train, and how many weights the potential has."""

    trained: int
    total: int


def select(
    potential: Potential, train: Sequence[str] = (), freeze: Sequence[str] = (), last: int | None = None
) -> Count:
    """Choose the weights that train by setting their ``requires_grad``; what was set before does not matter.

    Parameters
    ----------
    potential : Potential
    train : str or sequence of str
        Patterns for names of weights (as in `named_parameters`; ``*`` stands for anything).
    freeze : str or sequence of str
        Patterns for weights that do not train, whatever `train` and `last` say.
    last : int, optional
        Train the last layers, counted from the output, with the readout; beside what `train` names.
        Without `train` and `last`, all weights train.

    Returns
    -------
    Count
        (how many weights train, how many there are)

    Raises
    ------
    ValueError
        For a pattern that matches nothing, more layers than there are, or if nothing is left to train.
    NotImplementedError
        For `last` with a family whose layers are not known.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import select
    >>> select(load_potential("lj"), freeze=["epsilon"])
    Count(trained=1, total=2)
    """
    if low_rank.has(potential):
        raise ValueError("Choose what is trained before low-rank updates are added, or merge them first.")
    parameters = dict(potential.named_parameters())
    chosen = matching(parameters, train) | _last(potential, last)
    if not train and last is None:
        chosen = set(parameters)
    chosen -= matching(parameters, freeze)
    if not chosen:
        raise ValueError(f"Nothing of this {potential.family} potential is left to train: freeze fewer weights.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return count(potential)


def prepare(
    potential: Potential,
    *,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    last: int | None = None,
    lora: int | None = None,
    alpha: float | None = None,
) -> str:
    """`select`, then with `lora` (a rank) updates of that rank on the linear maps among the chosen weights.

    Where it raises, nothing has changed. Returns what `describe` says of the result.

    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import prepare
    >>> prepare(load_potential("lj"), train=["sig*"])
    'trains 1 of 2 weights'
    """
    before = {name: p.requires_grad for name, p in potential.named_parameters()}
    select(potential, train, freeze, last)
    if lora is not None:
        try:
            low_rank.add(potential, lora, alpha=alpha)
        except ValueError:
            for name, parameter in potential.named_parameters():
                parameter.requires_grad_(before[name])
            raise
    return describe(potential)


def count(potential: Potential) -> Count:
    """How many numbers train (with low-rank updates: theirs), and how many weights the potential has.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import count, select
    >>> potential = load_potential("lj")
    >>> line = select(potential, freeze=["epsilon"])
    >>> count(potential)
    Count(trained=1, total=2)
    """
    trained = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    return Count(trained, sum(weight.numel() for weight in low_rank.weights(potential).values()))


def describe(potential: Potential) -> str:
    """What is trained, in a line, as "trains 1,024 of 72,848 weights".

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import describe
    >>> describe(load_potential("lj"))
    'trains all 2 weights'
    """
    trained, total = count(potential)
    if (settings := low_rank.settings(potential)) is not None:
        return f"trains {trained:,} parameters of low-rank updates of {total:,} weights (LoRA, rank {settings['rank']})"
    return f"trains all {total:,} weights" if trained == total else f"trains {trained:,} of {total:,} weights"


def groups(
    potential: Potential,
    stepper: Stepper | None = None,
    rates: Mapping[str, float] | None = None,
    *,
    lr: float,
    stepper_rate: float = STEPPER_RATE,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, of what trains.

    Parameters
    ----------
    potential : Potential
    stepper : Stepper, optional
        Each of its own Parameters is a group, for they differ by orders of magnitude.
    rates : mapping of str to float, optional
        By a pattern for names of weights, the factor on their learning rate. The first pattern that fits counts.
    lr : float
        What the factors multiply. The weights that no pattern fits have no rate of their own here:
        the optimizer's holds.
    stepper_rate : float
        The learning rate of each hyperparameter of the stepper, as a share of its value: a step of Adam moves it by
        about as much.

    Returns
    -------
    list of dict
        "params", "name", and "lr" where it is not that of the optimizer; the weights without a pattern first.

    Raises
    ------
    ValueError
        For a pattern that matches nothing that trains, or a factor that is not positive.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import groups
    >>> [(g["name"], g.get("lr")) for g in groups(load_potential("lj"), rates={"sig*": 0.1}, lr=1e-3)]
    [('weights', None), ('sig*', 0.0001)]
    """
    check_positive(lr=lr, stepper_rate=stepper_rate)
    left = [(plain(name), p) for name, p in potential.named_parameters() if p.requires_grad]
    trained = {name for name, _ in left}
    made: list[dict[str, Any]] = []
    for pattern, factor in (rates or {}).items():
        check_positive(**{f"The factor of {pattern!r}": factor})
        hits = matching(trained, [pattern], "weight that trains")
        made.append(_group(pattern, [p for name, p in left if name in hits], factor * lr))
        left = [(name, p) for name, p in left if name not in hits]
    made.insert(0, {"name": "weights", "params": [p for _, p in left]})
    for name, p in stepper.named_parameters() if stepper is not None else ():
        if p.requires_grad:
            size = p.detach().abs().max().item()
            made.append(_group(f"stepper.{name}", [p], stepper_rate * (size or 1.0)))
    return [group for group in made if group["params"]]


def _last(potential: Potential, last: int | None) -> set[str]:
    if last is None:
        return set()
    found = layers(potential)
    if not 1 <= last <= len(found):
        raise ValueError(
            f"This {potential.family} potential has {len(found)} layers: the last {last} of them cannot be trained."
        )
    return {name for layer in found[-last:] for name in layer}


def _group(name: str, params: list[nn.Parameter], lr: float) -> dict[str, Any]:
    return {"name": name, "params": params, "lr": lr}


def layers(potential: Potential) -> list[list[str]]:
    """Names of the weights from the first layer to the last, the readout with the last.

    An adapter knows them: it has a method ``layers`` that returns them, most simply by `staged`.

    Raises
    ------
    NotImplementedError
        For a family whose layers are not known.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import layers
    >>> len(layers(load_potential("direct"))) > 1
    True
    """
    # Of the class: a module may call its own list of modules so.
    own = getattr(type(potential), "layers", None)
    if own is None:
        raise NotImplementedError(
            f"The layers of the family {potential.family!r} are not known: choose weights by patterns of their names."
        )
    return own(potential)


def staged(
    potential: Potential, *, before: tuple[str, ...] = (), stacks: tuple[str, ...], after: tuple[str, ...] = ()
) -> list[list[str]]:
    """Names of the weights by layer, from what their names begin with.

    Parameters
    ----------
    potential : Potential
    before : tuple of str
        Prefixes of what comes before the layers; it belongs to the first one.
    stacks : tuple of str
        Prefixes of lists of modules, each followed by a number. Stacks are counted from their ends, for their last
        modules are side by side.
    after : tuple of str
        Prefixes of what comes after the layers; it belongs to the last one.
    """
    names = [name for name, _ in potential.named_parameters()]
    depth = {
        stack: 1 + max((k for name in names if (k := _index(name, stack)) is not None), default=-1) for stack in stacks
    }
    deepest = max(depth.values())
    found: list[list[str]] = [[] for _ in range(deepest + 1)]
    for name in names:
        place = next(((s, k) for s in stacks if (k := _index(name, s)) is not None), None)
        if place is not None:
            stack, index = place
            found[deepest - depth[stack] + index + 1].append(name)
        elif name.startswith(after):
            found[-1].append(name)
        elif name.startswith(before):
            found[0].append(name)
    return [layer for layer in found if layer]


def _index(name: str, stack: str) -> int | None:
    """The number of a layer, where it is one of this stack."""
    found = re.match(r"\d+", name.removeprefix(stack)) if name.startswith(stack) else None
    return int(found[0]) if found else None
