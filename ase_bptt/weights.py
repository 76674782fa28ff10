"""Noticing that a weight was changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Versions = tuple[tuple[int, int], ...]


class Weights:
    """The parameters of some modules, found once: to walk through a module costs as much as the energy of a small cell.

    A parameter that is changed in place or replaced is noticed; a module that is put in later, or a
    parameter of TorchScript's that is replaced, is not.
    """

    def __init__(self, *modules: nn.Module):
        self.modules = modules
        self._find()

    def _find(self) -> None:
        self._slots: list[tuple[Mapping[str, Tensor | None], str]] = []
        for module in (part for whole in self.modules for part in whole.modules()):
            held: Mapping[str, Tensor | None] = module._parameters
            if isinstance(module, torch.jit.ScriptModule):  # holds no dictionary
                held = dict(module.named_parameters(recurse=False))
            self._slots += [(held, name) for name in held]

    def versions(self) -> Versions:
        """Changes whenever a weight is changed in place or replaced."""
        # A weight that was given an update (ase_bptt.tuning.lora) lies elsewhere since, beside the update's numbers.
        if not all(name in held for held, name in self._slots):
            self._find()
        found = (held.get(name) for held, name in self._slots)
        return tuple((p.data_ptr(), p._version) for p in found if p is not None)
