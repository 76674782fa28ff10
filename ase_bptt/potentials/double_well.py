"""A double well in the length of a dimer, with a bump that only the beginning of a path can feel."""

from __future__ import annotations

import torch
from torch import nn

from ..neighbors import Pairs
from ..potential import Potential, Prediction
from ..structures import Structures


class DoubleWell(Potential):
    """barrier (1 - s^2)^2 + height bump(s) with s = (r - 3 Å) / 0.5 Å, for dimers of length r: minima at 2.5 and 3.5 Å.

    The bump (1 - ((s - centre) / width)^2)^4 ends before either minimum, so that the weight `height` moves neither:
    it can only decide which one a path falls into. A textbook case, and not for atoms.

    Parameters
    ----------
    height : float
        Of the bump in eV; the only weight.
    barrier : float
        Between the minima, in eV.
    centre, width : float
        Of the bump, in units of s.
    """

    family = "double-well"

    def __init__(self, height: float = 0.0, barrier: float = 1.0, centre: float = 0.2, width: float = 0.3):
        super().__init__()
        if not (width > 0 and abs(centre) + width < 1):
            raise ValueError(f"The bump must end before s = -1 and 1, got centre {centre} and width {width}.")
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))
        self.barrier, self.centre, self.width = barrier, centre, width
        self.cutoff = 6.0

    def forward(self, structures: Structures, pairs: Pairs) -> Prediction:
        s = (pairs.vectors(structures).norm(dim=1) - 3) / 0.5
        left = (1 - ((s - self.centre) / self.width).square()).clamp(min=0)
        halves = (self.barrier * (1 - s.square()).square() + self.height * left**4) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, pairs.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)
