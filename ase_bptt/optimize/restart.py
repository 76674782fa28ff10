"""The restart file of an ASE run: the stepper's whole state as JSON, and what a cell filter measures strain from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io.jsonio import decode, encode
from ase.optimize.optimize import Optimizer, RestartError
from torch import Tensor

from ..steppers import State
from ..utils import replacing

BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What a restart file raises that is cut, edited or another run's."""


def write_restart(optimizer: Optimizer, data: Any) -> None:
    """Write the restart file, where the run has one, on the first rank."""
    if optimizer.restart is not None and optimizer.comm.rank == 0:
        with replacing(optimizer.restart) as temporary:
            temporary.write_text(encode(data))


def read_restart(optimizer: Optimizer) -> Any:
    """What the restart file holds; ValueError where it is not JSON."""
    # ASE's own reader warns of every class but BFGS on a cell filter.
    return decode(Path(str(optimizer.restart)).read_text(), always_array=False)


REFERENCES = ("orig_cell", "origcell", "strain")
"""What ASE's cell filters measure their strain from, or keep of it; without it a restart takes another path."""


def filter_to_json(target: Any) -> dict[str, Any]:
    """What a filter holds beside its atoms, as nested lists; nothing of Atoms and bands."""
    return {name: np.asarray(getattr(target, name)).tolist() for name in REFERENCES if hasattr(target, name)}


def filter_from_json(saved: dict[str, Any], target: Any) -> None:
    """Give a filter what another one held; ValueError where it holds other things."""
    if saved.keys() != filter_to_json(target).keys():
        raise ValueError(f"it belongs to a run on another kind of filter than {type(target).__name__}")
    for name, value in saved.items():
        setattr(target, name, np.array(value, dtype=float).reshape(np.shape(getattr(target, name))))


def unreadable(optimizer: Optimizer, error: Exception) -> RestartError:
    """The error that says what is wrong with a restart file."""
    return RestartError(
        f"Could not decode the restart file {optimizer.restart} ({type(error).__name__}: {error}): "
        "delete it to start afresh."
    )


def state_to_json(state: State) -> dict[str, Any]:
    """A stepper's state as nested lists."""
    return {
        "atoms": {k: v.tolist() for k, v in state.atoms.items()},
        "structures": {k: v.tolist() for k, v in state.structures.items()},
        "lists": {k: [t.tolist() for t in v] for k, v in state.lists.items()},
    }


def state_from_json(saved: dict[str, Any], like: State) -> State:
    """The saved state, in the dtypes and shapes of the first state of this run; axes of length 0 grow in a run.

    Raises
    ------
    ValueError, KeyError, TypeError
        Where it is no state, or of other shapes.
    """

    def tensor(name: str, values: Any, like: Tensor) -> Tensor:
        found = torch.tensor(values, dtype=like.dtype)
        if found.ndim != like.ndim or any(0 != b != a for a, b in zip(found.shape, like.shape)):
            raise ValueError(f"its {name} are those of {len(found)} rows, not {len(like)}")
        return found

    def tensors(saved: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor(name, saved[name], value) for name, value in like.items()}

    def listed(name: str, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor(name, values, value) for values, value in zip(saved["lists"][name], like, strict=True))

    return State(
        tensors(saved["atoms"], like.atoms),
        tensors(saved["structures"], like.structures),
        {name: listed(name, value) for name, value in like.lists.items()},
    )
