"""A torch twin of ase.calculators.lj.LennardJones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Pairs
from ..potential import Potential, Prediction
from ..structures import Structures


class LennardJones(Potential):
    """4 epsilon [(sigma/r)^12 - (sigma/r)^6], with ASE's two ways to end it at the cutoff.

    Parameters
    ----------
    epsilon : float
        Depth of the well in eV; a weight.
    sigma : float
        Distance of zero energy in Å; a weight.
    rc : float or None
        Cutoff in Å, 3 sigma by default.
    ro : float or None
        Where the smooth cutoff sets in, in Å, 0.66 rc by default.
    smooth : bool
        False shifts the energy to zero at rc (forces jump there); True multiplies it by a function
        that falls from 1 at ro to 0 at rc, so that forces are continuous.
    """

    family = "lj"
    atomic_properties = ("energies", "stresses")

    def __init__(
        self,
        epsilon: float = 1.0,
        sigma: float = 1.0,
        rc: float | None = None,
        ro: float | None = None,
        smooth: bool = False,
    ):
        super().__init__()
        self.epsilon = nn.Parameter(torch.tensor(epsilon, dtype=torch.float64))
        self.sigma = nn.Parameter(torch.tensor(sigma, dtype=torch.float64))
        self.cutoff = float(3 * sigma if rc is None else rc)
        self.onset = float(0.66 * self.cutoff if ro is None else ro)
        self.smooth = bool(smooth)

    def forward(self, structures: Structures, pairs: Pairs) -> Prediction:
        halves = self._pair_energies(pairs.vectors(structures)) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, pairs.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def stresses(self, structures: Structures, pairs: Pairs) -> Tensor:
        with torch.enable_grad():
            vectors = pairs.vectors(structures).detach().requires_grad_()
            energy = self._pair_energies(vectors).sum() / 2
            (slope,) = torch.autograd.grad(energy, vectors)
        # Each pair stands in both directions, so the atom i of each row gets just its half.
        virials = slope.unsqueeze(2) * vectors.detach().unsqueeze(1)
        per_atom = virials.new_zeros(structures.n_atoms, 3, 3).index_add(0, pairs.i, virials)
        return per_atom / structures.volumes[structures.batch][:, None, None]

    def _pair_energies(self, vectors: Tensor) -> Tensor:
        r2 = vectors.square().sum(1)
        energies = self._well(r2)
        if self.smooth:
            return energies * self._switch(r2)
        return energies - self._well(r2.new_tensor(self.cutoff**2))

    def _well(self, r2: Tensor) -> Tensor:
        c6 = (self.sigma**2 / r2) ** 3
        return 4 * self.epsilon * (c6**2 - c6)

    def _switch(self, r2: Tensor) -> Tensor:
        """1 below the onset, 0 beyond the cutoff, a cubic in r^2 between (as in HOOMD-blue)."""
        rc2, ro2 = self.cutoff**2, self.onset**2
        between = (rc2 - r2) ** 2 * (rc2 + 2 * r2 - 3 * ro2) / (rc2 - ro2) ** 3
        return torch.where(r2 < ro2, 1.0, torch.where(r2 < rc2, between, 0.0))

    @classmethod
    def from_name(cls, variant: str | None) -> LennardJones:
        if variant is not None:
            raise ValueError(f"The family 'lj' has no variant {variant!r}; build LennardJones(...) in Python.")
        return cls()

    def config(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon.item(),
            "sigma": self.sigma.item(),
            "rc": self.cutoff,
            "ro": self.onset,
            "smooth": self.smooth,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LennardJones:
        return cls(**config)
