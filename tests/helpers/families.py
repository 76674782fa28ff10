"""Small models of families with an environment of their own, in the families' own files, and their calculators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from ase.calculators.calculator import Calculator

from ase_bptt import Potential
from ase_bptt.potentials.matgl import MatGL
from ase_bptt.potentials.mattersim import MatterSim
from ase_bptt.potentials.nequip import NequIP
from ase_bptt.threads import Building, quiet

NEQUIP = {
    "_target_": "nequip.model.NequIPGNNModel",
    "seed": 1,
    "model_dtype": "float32",
    "type_names": ["H", "C", "O", "Si"],
    "r_max": 4.0,
    "num_layers": 2,
    "l_max": 1,
    "num_features": 4,
    "radial_mlp_width": 8,
    "avg_num_neighbors": 12.0,
    "per_type_energy_scales": 3.0,
    "per_type_energy_shifts": {"H": -1.1, "C": -2.2, "O": -3.3, "Si": -4.4},
    "pair_potential": {
        "_target_": "nequip.nn.pair_potential.ZBL",
        "units": "metal",
        "chemical_species": ["H", "C", "O", "Si"],
    },
}
"""The configuration of a small NequIP."""
MATGL = {
    "TensorNet": {"units": 8, "num_rbf": 8, "width": 0.7},
    "M3GNet": {
        "units": 8, "dim_node_embedding": 8, "dim_edge_embedding": 8, "nblocks": 2, "max_n": 2, "max_l": 2,
        "threebody_cutoff": 3.5, "use_smooth": True,
    },
}  # fmt: skip
"""The arguments of small networks of matgl."""


@dataclass(frozen=True)
class Family:
    """What a test needs to know of a family.

    Attributes
    ----------
    package : str
        The one to be imported.
    write : function
        Writes a small model to a file of the family's own in a folder, and returns its path.
    calculator : function
        The family's own calculator for such a file, or one that we wrote.
    network : str
        Which one, where the family has several.
    pickled : bool
        Whether its files are pickles, which are not opened without trust.
    """

    name: str
    package: str
    write: Callable[[Path], Path]
    calculator: Callable[[Path], Calculator]
    network: str = ""
    pickled: bool = True

    @property
    def here(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def marked(self):
        """As a parameter of a test, which is skipped where the family is not installed."""
        mark = pytest.mark.skipif(not self.here, reason=f'needs pip install "ase_bptt[{self.name}]", on its own')
        return pytest.param(self, id=f"{self.name}-{self.network}".strip("-"), marks=mark)


def write_mattersim(folder: Path) -> Path:
    from mattersim.forcefield import Potential as Wrapped
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    torch.manual_seed(0)
    model = M3Gnet(num_blocks=2, units=16, max_l=3, max_n=3, cutoff=4.5, threebody_cutoff=3.5, device="cpu")
    with torch.no_grad():  # forces that are large enough to relax by
        model.normalizer.scale.fill_(40.0)
    path = Path(folder) / "small.pth"
    Wrapped(model, device="cpu").save(str(path))
    return path


def mattersim_calculator(path: Path) -> Calculator:
    from mattersim.forcefield import MatterSimCalculator

    return MatterSimCalculator.from_checkpoint(str(path), device="cpu")


def small_nequip(**changes) -> Potential:
    return NequIP.from_config(NEQUIP | changes)


def write_nequip(folder: Path) -> Path:
    """As nequip's trainer lays a checkpoint out."""
    potential = small_nequip()
    state = {f"model.sole_model.{name}": value for name, value in potential.model.state_dict().items()}
    hyper_parameters = {"model": dict(NEQUIP), "num_datasets": {"train": 1, "val": 1, "test": 0}, "info_dict": {}}
    path = Path(folder) / "small.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters, "epoch": 1}, path)
    return path


def nequip_calculator(path: Path) -> Calculator:
    """The one of a package; nequip's function for files would set torch's default dtype for good, to float64."""
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.model import ModelFromPackage
    from nequip.utils import torch_default_dtype

    class InFloat64(NequIPCalculator):
        def atoms_to_data(self, atoms):
            with torch_default_dtype(torch.float64):
                return super().atoms_to_data(atoms)

    with quiet():
        model = ModelFromPackage(str(path))["sole_model"].eval()
    species = {name: name for name in model.type_names}
    transforms = basic_transforms(model.metadata, float(model.metadata["r_max"]), model.type_names, species)
    return InFloat64(model, device="cpu", transforms=transforms)


def small_matgl(network: str, **changes):
    """A Potential of matgl whose forces are large enough to relax by; changes are arguments of the network."""
    from matgl import models
    from matgl.apps.pes import Potential as Wrapped

    factor, scale, seed = {"TensorNet": (1.5, 20.0, 0), "M3GNet": (2.0, 5.0, 4)}[network]
    arguments = {"element_types": ("H", "C", "O", "Si"), "is_intensive": False, "cutoff": 4.5}
    with Building(seed=seed):
        model = getattr(models, network)(**arguments | MATGL[network] | changes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return Wrapped(model, data_std=scale, element_refs=[-1.1, -2.2, -3.3, -4.4])


def write_matgl(folder: Path, network: str = "TensorNet") -> Path:
    path = Path(folder) / "small"
    small_matgl(network).save(path)
    return path


def matgl_calculator(path: Path, dtype: torch.dtype = torch.float32) -> Calculator:
    import matgl
    from matgl.ext.ase import PESCalculator

    return PESCalculator(matgl.load_model(path).to(dtype).eval(), stress_unit="eV/A3")


MATTERSIM = Family(MatterSim.family, "mattersim", write_mattersim, mattersim_calculator)
FAMILIES = [MATTERSIM, Family(NequIP.family, "nequip", write_nequip, nequip_calculator)]
FAMILIES += [
    Family(MatGL.family, "matgl", partial(write_matgl, network=name), matgl_calculator, name, pickled=False)
    for name in MATGL
]
