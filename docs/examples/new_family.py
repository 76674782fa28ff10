"""A family of potentials: a small network for a few elements that takes the charge of a structure."""

import torch
from torch import nn

from ase_bptt import Potential, Prediction


class Network(nn.Module):
    """The family's own module: an energy for each atom from its element, its neighbours and the charge."""

    def __init__(self, elements=(6, 8, 14), cutoff=4.0, width=12):
        super().__init__()
        self.settings = {"elements": list(elements), "cutoff": cutoff, "width": width}
        table = torch.full((119,), -1)
        table[list(elements)] = torch.arange(len(elements))
        self.register_buffer("rows", table, persistent=False)
        self.register_buffer("centres", torch.linspace(0.5, cutoff, width))
        self.element = nn.Embedding(len(elements), width)
        self.energy = nn.Sequential(nn.Linear(width + 1, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, numbers, i, j, distances, charges):
        """Energies of the atoms, in eV, from edges i to j; charges are those of the structures, for each atom."""
        kinds = self.element(self.rows[numbers])
        # Falls to zero at the cutoff with two derivatives, so that energy, forces and Hessian are continuous.
        end = (1 - (distances / self.settings["cutoff"]).square()).clamp(min=0) ** 3
        waves = torch.exp(-4 * (distances[:, None] - self.centres).square()) * end[:, None]
        seen = kinds.index_add(0, i, waves * kinds[j])
        return self.energy(torch.cat((seen, charges[:, None]), 1)).squeeze(1)


class Soft(Potential):
    """The adapter."""

    family = "soft"  # the name for load_potential("soft") and --potential soft
    licence = "MIT"
    native_name = "soft.pt"
    atomic_properties = ("energies",)
    inputs = frozenset({"charge"})

    def __init__(self, network):
        super().__init__()
        self.network, self.cutoff = network, network.settings["cutoff"]
        self.atomic_numbers = frozenset(network.settings["elements"])

    def forward(self, structures, edges):
        """Energies from tensors that are attached to positions and cells; forces and stress follow."""
        distances = edges.vectors(structures).norm(dim=1)
        charges = structures.charges[structures.batch]
        atomic = self.network(structures.numbers, edges.i, edges.j, distances, charges)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    @classmethod
    def from_name(cls, variant):  # "soft", or "soft:7" with another seed: a real family loads weights here
        with torch.random.fork_rng([]):
            torch.manual_seed(int(variant or 0))
            return cls(Network())

    def config(self):
        return self.network.settings

    @classmethod
    def from_config(cls, config):  # weights are loaded into it afterwards
        return cls(Network(**config))

    @classmethod
    def owns(cls, native):  # a module, or what a checkpoint unpickles to
        return isinstance(native, Network) or (isinstance(native, dict) and native.get("format") == "soft 1")

    @classmethod
    def from_native(cls, native):
        if isinstance(native, Network):
            return cls(native)
        network = Network(**native["settings"]).to(native["weights"]["energy.0.weight"].dtype)
        network.load_state_dict(native["weights"])
        return cls(network)

    def save_native(self, path):
        native = {"format": "soft 1", "settings": self.network.settings, "weights": self.network.state_dict()}
        torch.save(native | {"metadata": dict(self.metadata)}, path)
