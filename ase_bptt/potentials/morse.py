"""A torch twin of ase.calculators.morse.MorsePotential."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Pairs
from ..potential import Potential, Prediction
from ..structures import Structures


class Morse(Potential):
    """epsilon [exp(-2 rho0 (r/r0 - 1)) - 2 exp(-rho0 (r/r0 - 1))], faded out between two radii.

    Parameters
    ----------
    epsilon : float
        Depth of the well in eV; a weight.
    rho0 : float
        Steepness: the force constant at the minimum is 2 epsilon (rho0 / r0)^2; a weight.
    r0 : float
        Distance of the minimum in Å; a weight.
    rcut1, rcut2 : float
        Where the smooth cutoff sets in and ends, in units of this r0; they stay there, in Å, when r0
        is trained. Energy, forces and their slopes are continuous.
    """

    family = "morse"
    atomic_properties = ("energies",)

    def __init__(
        self,
        epsilon: float = 1.0,
        rho0: float = 6.0,
        r0: float = 1.0,
        rcut1: float = 1.9,
        rcut2: float = 2.7,
    ):
        super().__init__()
        if not 0 <= rcut1 < rcut2:
            raise ValueError(f"The cutoff of a Morse potential must have 0 <= rcut1 < rcut2, got {rcut1} and {rcut2}.")
        self.epsilon = nn.Parameter(torch.tensor(epsilon, dtype=torch.float64))
        self.rho0 = nn.Parameter(torch.tensor(rho0, dtype=torch.float64))
        self.r0 = nn.Parameter(torch.tensor(r0, dtype=torch.float64))
        self.onset = float(rcut1 * r0)
        self.cutoff = float(rcut2 * r0)

    def forward(self, structures: Structures, pairs: Pairs) -> Prediction:
        r = pairs.vectors(structures).square().sum(1).sqrt()
        halves = self._well(r) * self._fade(r) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, pairs.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _well(self, r: Tensor) -> Tensor:
        decay = torch.exp(self.rho0 * (1 - r / self.r0))
        return self.epsilon * decay * (decay - 2)

    def _fade(self, r: Tensor) -> Tensor:
        """1 up to the onset, 0 from the cutoff on; the quintic between has no slope or curvature at its ends."""
        left = ((self.cutoff - r) / (self.cutoff - self.onset)).clamp(0, 1)
        return left**3 * (10 - 15 * left + 6 * left**2)

    @classmethod
    def from_name(cls, variant: str | None) -> Morse:
        if variant is not None:
            raise ValueError(f"The family 'morse' has no variant {variant!r}; build Morse(...) in Python.")
        return cls()

    def config(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon.item(),
            "rho0": self.rho0.item(),
            "r0": self.r0.item(),
            "onset": self.onset,
            "cutoff": self.cutoff,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Morse:
        weights = {name: config[name] for name in ("epsilon", "rho0", "r0")}
        potential = cls(**weights)
        # In Å, since r0 may have moved from where it stood when rcut1 and rcut2 were chosen.
        potential.onset, potential.cutoff = config["onset"], config["cutoff"]
        return potential
