"""A torch twin of ase.calculators.emt.EMT, the effective medium theory of simple metals.

Formulas and parameters: Jacobsen, Stoltze, Nørskov, Surf. Sci. 366, 394 (1996). The neutral-sphere
radius s of an atom follows from the density that its neighbours lend it (sigma_1); its energy is
that of an atom in an fcc crystal of this radius, and a sum over neighbours (sigma_2) that is zero in that crystal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from ase.data import atomic_numbers
from ase.units import Bohr
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Prediction
from ..structures import Structures
from .analytic import Parametrised

# Units of the table; a column becomes a weight, in eV and Å.
COLUMNS = {"E0": 1.0, "s0": Bohr, "V0": 1.0, "eta2": 1 / Bohr, "kappa": 1 / Bohr, "lambda_": 1 / Bohr, "n0": Bohr**-3}
# H, C, N and O are ASE's own addition: good for trying things out, not for physics.
ELEMENTS = {
    "H": (-3.21, 1.31, 0.132, 2.652, 2.790, 3.892, 0.00547),
    "C": (-3.50, 1.81, 0.332, 1.652, 2.790, 1.892, 0.01322),
    "N": (-5.10, 1.88, 0.132, 1.652, 2.790, 1.892, 0.01222),
    "O": (-4.60, 1.95, 0.332, 1.652, 2.790, 1.892, 0.00850),
    "Al": (-3.28, 3.00, 1.493, 1.240, 2.000, 1.169, 0.00700),
    "Ni": (-4.44, 2.60, 3.673, 1.669, 2.757, 1.948, 0.01030),
    "Cu": (-3.51, 2.67, 2.476, 1.652, 2.740, 1.906, 0.00910),
    "Pd": (-3.90, 2.87, 2.773, 1.818, 3.107, 2.155, 0.00688),
    "Ag": (-2.96, 3.01, 2.132, 1.652, 2.790, 1.892, 0.00547),
    "Pt": (-5.85, 2.90, 4.067, 1.812, 3.145, 2.192, 0.00802),
    "Au": (-3.80, 3.00, 2.321, 1.674, 2.873, 2.182, 0.00703),
}
BETA = 1.809
"""Nearest-neighbour distance in fcc over s: (16 pi / 3)^(1/3) / 2^(1/2), with the rounding that has become custom."""
SHELLS = ((1, 12), (2, 6), (3, 24))
"""Squared distance, in nearest-neighbour distances, and number of the neighbours in fcc that count."""


class EMT(Parametrised):
    """Effective medium theory for Al, Ni, Cu, Pd, Ag, Pt, Au, and (not for serious use) H, C, N, O.

    Parameters
    ----------
    asap_cutoff : bool
        False takes one cutoff for all structures, from the largest element of the table; True takes
        it from the largest element in each structure, as ASAP does.

    Attributes
    ----------
    E0, s0, V0, eta2, kappa, lambda_, n0 : nn.Parameter, shape (n_elements,)
        The paper's parameters in eV, Å, eV, 1/Å, 1/Å, 1/Å and 1/Å^3, one for each of `elements`. The
        cutoffs come from the published s0, and stay where they are when s0 is trained.
    elements : tuple of str
        Symbols, in the order of the weights.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import TorchCalculator
    >>> from ase_bptt.potentials.emt import EMT
    >>> atoms = bulk("Cu", a=3.6)
    >>> atoms.calc = TorchCalculator(EMT())
    >>> print(f"{atoms.get_potential_energy():.4f} eV")
    -0.0067 eV
    """

    family = "emt"
    atomic_properties = ("energies",)

    E0: nn.Parameter
    s0: nn.Parameter
    V0: nn.Parameter
    eta2: nn.Parameter
    kappa: nn.Parameter
    lambda_: nn.Parameter
    n0: nn.Parameter
    sizes: Tensor
    kinds: Tensor

    def __init__(self, asap_cutoff: bool = False):
        super().__init__()
        self.asap_cutoff = bool(asap_cutoff)
        self.elements = tuple(ELEMENTS)
        numbers = [atomic_numbers[symbol] for symbol in self.elements]
        self.atomic_numbers = frozenset(numbers)
        columns = torch.tensor(list(ELEMENTS.values()), dtype=torch.float64).T
        for (name, unit), column in zip(COLUMNS.items(), columns, strict=True):
            self.register_parameter(name, nn.Parameter(column * unit))
        self.register_buffer("sizes", self.s0.detach().clone(), persistent=False)
        # An element that is not here gets a row beyond the table, so that it cannot pass for another.
        kinds = torch.full((len(atomic_numbers),), len(numbers))
        kinds[numbers] = torch.arange(len(numbers))
        self.register_buffer("kinds", kinds, persistent=False)
        self.cutoff = self._ends(self.sizes.max())[2].item()

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        kind = self.kinds[structures.numbers]
        size = self._largest(structures, kind)
        middle, steepness, end = self._ends(size)
        gamma1, gamma2 = (g[structures.batch, kind] for g in self._gammas(middle, steepness))
        E0, s0, V0, eta2, kappa, lambda_, n0 = (getattr(self, name)[kind] for name in COLUMNS)

        i, j, r = edges.i, edges.j, edges.vectors(structures).square().sum(1).sqrt()
        if self.asap_cutoff:
            near = r < end[structures.batch[i]]
            i, j, r = i[near], j[near], r[near]
        of = structures.batch[i]
        lent = torch.sigmoid(steepness[of] * (middle[of] - r)) * n0[j] / n0[i]
        sigma1 = _sum(lent * torch.exp(-eta2[j] * (r - BETA * s0[j])), i, structures.n_atoms)
        shares = -V0[i] / (4 * gamma2[i]) * lent * torch.exp(-kappa[j] * (r / BETA - s0[j]))

        # An isolated atom has no radius (log 0): neither cohesion nor a gradient.
        bound = sigma1 > 0
        wider = -torch.log(torch.where(bound, sigma1, 1.0) / (12 * gamma1)) / (BETA * eta2)
        cohesion = torch.where(bound, E0 * (1 + lambda_ * wider) * torch.exp(-lambda_ * wider), 0.0) - E0
        repulsion = torch.where(bound, 6 * V0 * torch.exp(-kappa * wider), 0.0)
        atomic = cohesion + (repulsion + sum(_sum(shares, k, structures.n_atoms) for k in (i, j)))
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    def _largest(self, structures: Structures, kind: Tensor) -> Tensor:
        """The s0 that sets the cutoff of each structure, shape (n,)."""
        if not self.asap_cutoff:
            return self.sizes.max().expand(len(structures))
        return self.sizes.new_zeros(len(structures)).scatter_reduce(0, structures.batch, self.sizes[kind], "amax")

    def _ends(self, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Middle (Å) and steepness (1/Å) of the function that ends the interaction, and where edges are cut (Å).

        The middle lies between the third and the fourth shell of fcc, and at the fourth 1e-4 is left.
        """
        nearest = BETA * size
        middle = nearest * (math.sqrt(3) + 2) / 2
        steepness = math.log(1 / 1e-4 - 1) / (2 * nearest - middle)
        return middle, steepness, middle * 1.045 if self.asap_cutoff else middle + 0.5

    def _gammas(self, middle: Tensor, steepness: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_1 / 12 and sigma_2 / 12 of each element's own fcc crystal, shape (n, n_elements)."""
        gamma1 = gamma2 = torch.zeros_like(middle).unsqueeze(1)
        for square, count in SHELLS:
            r = BETA * self.s0 * math.sqrt(square)
            part = count / 12 * torch.sigmoid(steepness.unsqueeze(1) * (middle.unsqueeze(1) - r))
            farther = r - BETA * self.s0
            gamma1 = gamma1 + part * torch.exp(-self.eta2 * farther)
            gamma2 = gamma2 + part * torch.exp(-self.kappa / BETA * farther)
        return gamma1, gamma2

    def config(self) -> dict[str, Any]:
        return {"asap_cutoff": self.asap_cutoff}


def _sum(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sum of the values for each index; eight partial sums each, as in numpy, keep the rounding small."""
    lane = torch.arange(len(values), device=index.device) % 8
    return values.new_zeros(n * 8).index_add(0, index * 8 + lane, values).view(n, 8).sum(1)
