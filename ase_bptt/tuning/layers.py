"""The layers of a potential, from its input to its output, by the names of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..potential import Potential


class Stages(NamedTuple):
    """Prefixes of a family's weights, from those at the input to those at the output."""

    before: tuple[str, ...]
    stacks: tuple[str, ...]
    """Each is a list of modules, and the last of all of them lie side by side."""
    after: tuple[str, ...]


STAGES = {
    "mace": Stages(("model.node_embedding.",), ("model.interactions.", "model.products.", "model.readouts."), ()),
    "chgnet": Stages(
        ("model.atom_embedding.", "model.bond_", "model.angle_embedding.", "model.angle_basis_expansion."),
        ("model.atom_conv_layers.", "model.bond_conv_layers.", "model.angle_layers."),
        ("model.site_wise.", "model.readout_norm.", "model.mlp."),
    ),
}


def layers(potential: Potential) -> list[list[str]]:
    """Names of the weights from the first layer to the last, the readout with the last.

    A family may say it itself, by a method ``layers`` that returns the same.

    Raises
    ------
    NotImplementedError
        For a family whose layers are not known.
    """
    own = getattr(type(potential), "layers", None)
    if own is not None:
        return own(potential)
    if potential.family not in STAGES:
        raise NotImplementedError(
            f"The layers of the family {potential.family!r} are not known: choose weights by patterns of their names."
        )
    return staged([name for name, _ in potential.named_parameters()], STAGES[potential.family])


def staged(names: Sequence[str], stages: Stages) -> list[list[str]]:
    """Layers from the prefixes of names: the stacks are counted from their ends, what comes after is in the last."""
    depth = {
        stack: 1 + max((_index(name, stack) for name in names if name.startswith(stack)), default=-1)
        for stack in stages.stacks
    }
    deepest = max(depth.values())
    found: list[list[str]] = [[] for _ in range(deepest + 1)]
    for name in names:
        stack = next((stack for stack in stages.stacks if name.startswith(stack)), None)
        if stack is not None:
            found[deepest - depth[stack] + _index(name, stack) + 1].append(name)
        elif name.startswith(stages.after):
            found[-1].append(name)
        elif name.startswith(stages.before):
            found[0].append(name)
    return [layer for layer in found if layer]


def _index(name: str, stack: str) -> int:
    return int(name.removeprefix(stack).partition(".")[0])
