"""Analytic potentials: Lennard-Jones, Morse, and a double well on which every step of the theory can be checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures


class Parametrised(Potential):
    """A potential that is defined by the arguments of its class, and has no pretrained variants."""

    @classmethod
    def from_name(cls, variant: str | None) -> Any:
        if variant is not None:
            raise ValueError(
                f"The family {cls.family!r} has no variant {variant!r}; build {cls.__name__}(...) in Python."
            )
        return cls()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


class LennardJones(Parametrised):
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

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import TorchCalculator
    >>> from ase_bptt.potentials.analytic import LennardJones
    >>> atoms = bulk("Ar", a=5.26)
    >>> atoms.calc = TorchCalculator(LennardJones(epsilon=0.0104, sigma=3.4))
    >>> print(f"{atoms.get_potential_energy():.4f} eV")
    -0.0826 eV
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

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        halves = self._pair_energies(edges.vectors(structures)) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, edges.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def stresses(self, structures: Structures, edges: Edges) -> Tensor:
        with torch.enable_grad():
            vectors = edges.vectors(structures).detach().requires_grad_()
            energy = self._pair_energies(vectors).sum() / 2
            (gradient,) = torch.autograd.grad(energy, vectors)
        # There is an edge in each direction, so the atom i of each row gets its half.
        virials = gradient.unsqueeze(2) * vectors.detach().unsqueeze(1)
        per_atom = virials.new_zeros(structures.n_atoms, 3, 3).index_add(0, edges.i, virials)
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

    def config(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon.item(),
            "sigma": self.sigma.item(),
            "rc": self.cutoff,
            "ro": self.onset,
            "smooth": self.smooth,
        }


class Morse(Parametrised):
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
        is trained. Energy, forces and their derivatives are continuous.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import TorchCalculator
    >>> from ase_bptt.potentials.analytic import Morse
    >>> atoms = molecule("N2")
    >>> atoms.calc = TorchCalculator(Morse(epsilon=9.9, rho0=2.96, r0=1.1))
    >>> print(f"{atoms.get_potential_energy():.2f} eV")
    -9.84 eV
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

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        r = edges.vectors(structures).square().sum(1).sqrt()
        halves = self._well(r) * self._fade(r) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, edges.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _well(self, r: Tensor) -> Tensor:
        decay = torch.exp(self.rho0 * (1 - r / self.r0))
        return self.epsilon * decay * (decay - 2)

    def _fade(self, r: Tensor) -> Tensor:
        """1 up to the onset, 0 from the cutoff on; a quintic between whose first two derivatives vanish at its ends."""
        left = ((self.cutoff - r) / (self.cutoff - self.onset)).clamp(0, 1)
        return left**3 * (10 - 15 * left + 6 * left**2)

    def config(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon.item(),
            "rho0": self.rho0.item(),
            "r0": self.r0.item(),
            "onset": self.onset,
            "cutoff": self.cutoff,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        weights = {name: config[name] for name in ("epsilon", "rho0", "r0")}
        potential = cls(**weights)
        # In Å, since r0 may have moved from where it stood when rcut1 and rcut2 were chosen.
        potential.onset, potential.cutoff = config["onset"], config["cutoff"]
        return potential


class DoubleWell(Potential):
    """barrier (1 - s^2)^2 + height bump(s) with s = (r - 3 Å) / 0.5 Å, for dimers of length r: minima at 2.5 and 3.5 Å.

    The bump (1 - ((s - centre) / width)^2)^4 vanishes at both minima, so that the weight `height` moves neither:
    it only decides which basin a path ends in. A textbook case, and not for materials.

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

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        s = (edges.vectors(structures).norm(dim=1) - 3) / 0.5
        left = (1 - ((s - self.centre) / self.width).square()).clamp(min=0)
        halves = (self.barrier * (1 - s.square()).square() + self.height * left**4) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, edges.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)
