"""The torch twins with the constructors of ASE's own calculators, for ASE's own tests (see ase_conformance.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ase_bptt import TorchCalculator
from ase_bptt.neighbors import Edges
from ase_bptt.potentials.analytic import LennardJones, Morse
from ase_bptt.potentials.emt import EMT
from ase_bptt.structures import Structures


class TorchEMT(TorchCalculator):
    def __init__(self, *, asap_cutoff: bool = False, **kwargs: Any):
        super().__init__(EMT(asap_cutoff), **kwargs)


class TorchLJ(TorchCalculator):
    def __init__(
        self,
        *,
        sigma: float = 1.0,
        epsilon: float = 1.0,
        rc: float | None = None,
        ro: float | None = None,
        smooth: bool = False,
        **kwargs: Any,
    ):
        super().__init__(LennardJones(epsilon, sigma, rc, ro, smooth), **kwargs)


class TorchMorse(TorchCalculator):
    def __init__(
        self,
        neighbor_list: Callable | None = None,
        *,
        epsilon: float = 1.0,
        r0: float = 1.0,
        rho0: float = 6.0,
        rcut1: float = 1.9,
        rcut2: float = 2.7,
        A: float | None = None,  # which ASE's own test passes, and its Morse potential keeps and does not use
        **kwargs: Any,
    ):
        # ASE's tests give A, of which its MorsePotential takes no notice.
        super().__init__(Morse(epsilon, rho0, r0, rcut1, rcut2), **kwargs)
        if neighbor_list is not None:
            self._neighbors = _Found(neighbor_list, self.potential.cutoff)


@dataclass
class _Found:
    """Edges from a function with the signature of ase.neighborlist.neighbor_list."""

    neighbor_list: Callable
    cutoff: float

    def __call__(self, structures: Structures) -> Edges:
        (atoms,) = structures.to_atoms()
        i, j, shifts = self.neighbor_list("ijS", atoms, self.cutoff)
        return Edges(*map(torch.from_numpy, (i, j, shifts.astype(np.float64))))
