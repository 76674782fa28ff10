"""DFT-D3 dispersion by torch-dftd (Grimme et al., J. Chem. Phys. 132, 154104 (2010))."""

from __future__ import annotations

from typing import Any

import torch

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from . import require

DAMPINGS = ("bj", "zero", "bjm", "zerom")
LARGEST = 94
"""Atomic number up to which there are parameters."""
CUTOFF = 12.0
"""Å. The tables were made for 50 Å, which is 70 times as many edges."""
COUNTED = 21.167
"""Å: the radius within which torch-dftd counts neighbours for coordination numbers, 40 Bohr."""


class D3(Potential):
    """The dispersion energy of a functional, without weights: a part of a `SumPotential`.

    It falls smoothly to zero in the last Bohr before the cutoff (torch-dftd's ``cutoff_smoothing="poly"``). Two-body
    terms only, as in most data sets.

    Parameters
    ----------
    functional : str
        As torch-dftd calls them: "pbe", "pbesol", "revpbe", "b3-lyp", ...
    damping : str
        "bj" (Becke-Johnson), "zero", or their modified forms "bjm" and "zerom".
    cutoff : float
        In Å.

    Raises
    ------
    ValueError
        For a functional or damping without parameters.
    ImportError
        Without torch-dftd, with the extra that installs it.
    """

    family = "d3"
    extra = "d3"
    installation = 'for DFT-D3 by pip install "ase_bptt[d3]"'
    licence = "MIT (torch-dftd)"
    atomic_properties = ("energies",)
    atomic_numbers = frozenset(range(1, LARGEST + 1))

    def __init__(self, functional: str = "pbe", damping: str = "bj", cutoff: float = CUTOFF):
        super().__init__()
        module = require("torch_dftd.nn.dftd3_module", extra="d3")
        self.functional, self.damping, self.cutoff = functional.lower(), damping.lower(), float(cutoff)
        self.terms = module.DFTD3Module(
            _parameters(self.functional, self.damping),
            cutoff=self.cutoff,
            cnthr=min(COUNTED, self.cutoff),
            dtype=torch.float64,
            bidirectional=True,
            cutoff_smoothing="poly",
        )

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        # torch-dftd sums edges over what it takes for structures. Summed over the first atom of each edge they are
        # energies of atoms; of what stands for the cells it then reads nothing but their number.
        atomic = self.terms.calc_energy_batch(
            structures.numbers,
            structures.positions,
            torch.stack((edges.i, edges.j)),
            cell=structures.positions[:, :, None],
            shift_pos=edges.offsets(structures),
            batch=structures.batch,
            batch_edge=edges.i,
            damping=self.damping,
        ).to(structures.positions)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    @classmethod
    def from_name(cls, variant: str | None) -> D3:
        """FUNCTIONAL, FUNCTIONAL:DAMPING or FUNCTIONAL:DAMPING:CUTOFF; by default pbe:bj."""
        functional, damping, cutoff, *more = [*(variant or "").split(":"), "", ""]
        try:
            reach = float(cutoff or CUTOFF)
        except ValueError:
            reach = 0.0
        if any(more) or not 0 < reach < float("inf"):
            raise ValueError(
                f"A dispersion correction is d3:FUNCTIONAL:DAMPING:CUTOFF, as d3:pbe:bj:12 with a cutoff in Å; got "
                f"'d3:{variant}'."
            )
        return cls(functional or "pbe", damping or "bj", reach)

    def config(self) -> dict[str, Any]:
        return {"functional": self.functional, "damping": self.damping, "cutoff": self.cutoff}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> D3:
        return cls(**config)


def _parameters(functional: str, damping: str) -> dict[str, float]:
    tables = require("torch_dftd.dftd3_xc_params", extra="d3")
    try:
        if damping not in DAMPINGS:
            raise ValueError
        return tables.get_dftd3_default_params(damping, functional)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"torch-dftd has no parameters for the functional {functional!r} with the damping {damping!r}: take a "
            f"functional such as pbe, pbesol, revpbe or b3-lyp, and one of {', '.join(DAMPINGS)}."
        ) from error
