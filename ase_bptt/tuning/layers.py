"""The layers of a potential, from its input to its output, by the names of their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..potential import Potential


class Stages(NamedTuple):
    """Prefixes of a family's weights, from those at the input to those at the output."""

    before: tuple[str, ...]
    stacks: tuple[str, ...]
    """Each is a list of modules, a number following the prefix; the last of all of them lie side by side."""
    after: tuple[str, ...]


STAGES = {
    "mace": Stages(("model.node_embedding.",), ("model.interactions.", "model.products.", "model.readouts."), ()),
    "chgnet": Stages(
        ("model.atom_embedding.", "model.bond_", "model.angle_embedding.", "model.angle_basis_expansion."),
        ("model.atom_conv_layers.", "model.bond_conv_layers.", "model.angle_layers."),
        ("model.site_wise.", "model.readout_norm.", "model.mlp."),
    ),
    # Its layers are told apart by the numbers that their names begin with.
    "sevennet": Stages(
        ("model.edge_embedding.", "model.onehot_to_feature_x."),
        ("model.",),
        ("model.reduce_", "model.rescale_atomic_energy.scale"),
    ),
    "direct": Stages(("elements.",), ("filters.", "updates."), ("energy_head.", "force_head.")),
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
        stack: 1 + max((k for name in names if (k := _index(name, stack)) is not None), default=-1)
        for stack in stages.stacks
    }
    deepest = max(depth.values())
    found: list[list[str]] = [[] for _ in range(deepest + 1)]
    for name in names:
        place = next(((s, k) for s in stages.stacks if (k := _index(name, s)) is not None), None)
        if place is not None:
            stack, index = place
            found[deepest - depth[stack] + index + 1].append(name)
        elif name.startswith(stages.after):
            found[-1].append(name)
        elif name.startswith(stages.before):
            found[0].append(name)
    return [layer for layer in found if layer]


def _index(name: str, stack: str) -> int | None:
    """The number of a layer, where it is one of this stack."""
    found = re.match(r"\d+", name.removeprefix(stack)) if name.startswith(stack) else None
    return int(found[0]) if found else None
