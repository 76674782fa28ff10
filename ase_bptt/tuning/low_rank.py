"""Low-rank updates: few parameters are trained beside frozen weights, and merged into them afterwards.

LoRA (Hu et al., arXiv 2106.09685): W + (alpha / rank) B A, with B zero at the start. A linear map
that keeps the symmetry (e3nn's o3.Linear) has a matrix for each of its paths from irreps to irreps,
and each gets an update of its own, as in ELoRA (Wang et al., ICML 2025), so that the symmetry stays.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..potential import Potential
from ..utils import check_positive

TRAINED = "_trained_before_lora"
"""Attribute of a potential with updates: the names of the weights that trained before."""
PARAMETRISED = re.compile(r"parametrizations\.(\w+)\.(?:original|\d+\..*)$")
SHOWN = 3


class LowRank(nn.Module):
    """What a linear map's weight becomes with an update, for `torch.nn.utils.parametrize`.

    Parameters
    ----------
    weight : Tensor
        The pretrained weight.
    blocks : list of (rows, columns)
        The matrices that lie one after the other in its last axis; None if it is a matrix itself.
    rank : int
        Of each update; no larger than its matrix allows.
    alpha : float
        The update is multiplied by alpha / rank.
    """

    def __init__(
        self, weight: Tensor, blocks: list[tuple[int, int]] | None, rank: int, alpha: float, generator: torch.Generator
    ):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        lead = () if blocks is None else weight.shape[:-1]
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for rows, columns in blocks or [cast(tuple[int, int], weight.shape)]:
            r = min(rank, rows, columns)
            # With entries of this size a step of Adam moves the weight about as far as if the weight itself
            # were trained, so that one learning rate fits both.
            right = torch.randn(*lead, r, columns, generator=generator, dtype=torch.float64) / r**0.5
            self.left.append(nn.Parameter(weight.new_zeros(*lead, rows, r)))
            self.right.append(nn.Parameter(right.to(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        updates = [(left @ right).flatten(-2) for left, right in zip(self.left, self.right, strict=True)]
        return weight + self.alpha / self.rank * torch.cat(updates, -1).reshape(weight.shape)


def add(
    potential: Potential, rank: int = 4, patterns: Sequence[str] = (), alpha: float | None = None, seed: int = 0
) -> int:
    """Put low-rank updates on the linear maps of a potential, and freeze all weights that it has.

    At first the updates are zero and the potential is what it was. Linear maps are torch's nn.Linear
    and e3nn's o3.Linear and layers of a radial network, where they hold weights of their own.

    Parameters
    ----------
    potential : Potential
        Changed in place: the names of these weights in its state dict change until `merge`.
    rank : int
        Of each update.
    patterns : str or sequence of str
        Names of the weights that get one, as in `named_parameters`; all linear maps that train if empty.
    alpha : float, optional
        The updates are multiplied by alpha / rank; rank by default.
    seed : int
        Of the first numbers.

    Returns
    -------
    int
        How many linear maps got an update.

    Raises
    ------
    ValueError
        For a pattern that matches nothing, a potential without linear maps, or with updates already.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import describe, low_rank
    >>> potential = load_potential("direct")
    >>> low_rank.add(potential, rank=2) > 0, describe(potential).startswith("trains")
    (True, True)
    """
    alpha = float(rank if alpha is None else alpha)
    check_positive(rank=rank, alpha=alpha)
    if has(potential):
        raise ValueError(f"This {potential.family} potential has low-rank updates already: merge them first.")
    parameters = dict(potential.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    chosen = matching(parameters, patterns) or trained
    maps = {name: module for name, module in _linear_maps(potential).items() if name in chosen}
    if not maps:
        some = " that are to be trained" if _linear_maps(potential) else ""
        raise ValueError(
            f"This {potential.family} potential has no linear maps{some}, which low-rank updates belong to: "
            "train its weights themselves, or others."
        )
    potential.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in maps.values():
        weight = cast(Tensor, module.weight)
        update = LowRank(weight.detach(), _blocks(module), int(rank), alpha, generator)
        parametrize.register_parametrization(module, "weight", update)
    setattr(potential, TRAINED, sorted(trained))
    return len(maps)


def merge(potential: Potential) -> Potential:
    """Fold the updates into the weights, in place: the same energies, from a plain potential.

    The weights train again that did before `add`. Nothing happens where there are no updates.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.tuning import low_rank
    >>> potential = load_potential("direct")
    >>> n = low_rank.add(potential, rank=2)
    >>> low_rank.has(low_rank.merge(potential))
    False
    """
    if not has(potential):
        return potential
    for module in list(_updated(potential).values()):
        _fold(module)
    trained = set(getattr(potential, TRAINED))
    delattr(potential, TRAINED)
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(name in trained)
    return potential


def merged(potential: Potential) -> Potential:
    """A plain copy with the updates folded in, for saving; the potential itself where there are none."""
    return merge(copy.deepcopy(potential)) if has(potential) else potential


def has(potential: Potential) -> bool:
    """Whether the potential has low-rank updates."""
    return hasattr(potential, TRAINED)


def weights(potential: Potential) -> dict[str, Tensor]:
    """The weights as the potential uses them, by their plain names: differentiable, updates included."""
    found = {plain(name): parameter for name, parameter in potential.named_parameters()}
    return found | {name: cast(Tensor, module.weight) for name, module in _updated(potential).items()}


def settings(potential: Potential) -> dict[str, Any] | None:
    """What `restore` needs, as JSON; None where there are no updates."""
    if not has(potential):
        return None
    maps = _updated(potential)
    update = _update(next(iter(maps.values())))
    return {"rank": update.rank, "alpha": update.alpha, "names": [*maps], "trained": getattr(potential, TRAINED)}


def restore(potential: Potential, settings: dict[str, Any]) -> None:
    """Put the same updates on a plain potential again; their numbers are for `load_state_dict`."""
    add(potential, settings["rank"], settings["names"], settings["alpha"])
    setattr(potential, TRAINED, list(settings["trained"]))


def _linear_maps(potential: Potential) -> dict[str, nn.Module]:
    """The modules that are linear maps with a weight of their own, by the weight's name."""
    return {
        f"{name}.weight": module
        for name, module in potential.named_modules()
        if _is_linear(module) and isinstance(module._parameters.get("weight"), nn.Parameter)
    }


def _is_linear(module: nn.Module) -> bool:
    # By name, for e3nn comes with some families only.
    return isinstance(module, nn.Linear) or type(module).__module__ == "e3nn.nn._fc" or _is_e3nn(module)


def _is_e3nn(module: nn.Module) -> bool:
    return type(module).__module__ == "e3nn.o3._linear" and hasattr(module, "instructions")


def _blocks(module: nn.Module) -> list[tuple[int, int]] | None:
    if not _is_e3nn(module):
        return None
    # Instructions without an input are biases.
    return [i.path_shape for i in cast(Any, module.instructions) if i.i_in >= 0 and 0 not in i.path_shape]


def _updated(potential: Potential) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in potential.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(_update(module), LowRank)
    }


def _update(module: nn.Module) -> LowRank:
    return cast(Any, module).parametrizations["weight"][0]


def _fold(module: nn.Module) -> None:
    """The weight as it is used becomes the weight.

    torch's remove_parametrizations would take the weight from all copies of the module as well.
    """
    weight = cast(Any, module).parametrizations["weight"].original
    with torch.no_grad():
        weight.copy_(module.weight)
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    # It stands first again: some compare two models parameter by parameter.
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight} | others)


def plain(name: str) -> str:
    """The name that a weight has without low-rank updates: the pretrained weight's and both factors' is one."""
    return PARAMETRISED.sub(r"\1", name)


def matching(names: Collection[str], patterns: Sequence[str], kind: str = "weight") -> set[str]:
    """Those of the names that match the pattern, or any of several (``*``, ``?`` and ``[...]`` as in a shell).

    Raises
    ------
    ValueError
        For a pattern that matches no name, with the names that come nearest.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            near = get_close_matches(pattern, sorted(names), SHOWN, cutoff=0)
            raise ValueError(
                f"No {kind} matches {pattern!r}; there are {len(names)}, as {', '.join(near)} "
                "(* stands for anything in a name)."
            )
        found |= hits
    return found
