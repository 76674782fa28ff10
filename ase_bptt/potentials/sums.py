"""Sums of potentials, such as a network that was fitted to a functional without dispersion, and DFT-D3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..tuning import layers
from . import as_potential, family


class SumPotential(Potential):
    """The sum of the energies of several potentials, each with the edges within its own cutoff.

    The energies are added before the one differentiation, so that forces, stress and all derivatives are those of the
    sum. Weights of all parts train; a correction such as `D3` has none, and stays as it is.

    Parameters
    ----------
    *potentials : Potential, module or str
        Two at least, as for `load_potential`; the first one gives dtype and device, and those that differ are copied.

    Raises
    ------
    ValueError
        For fewer than two.
    NotImplementedError
        For forces that are predicted directly, which are no gradient of an energy.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import SumPotential, TorchCalculator
    >>> energies = []
    >>> for potential in ("lj", "morse", SumPotential("lj", "morse")):
    ...     energies.append(TorchCalculator(potential).get_potential_energy(bulk("Ar", a=2.2)))
    >>> abs(energies[0] + energies[1] - energies[2]) < 1e-12
    True
    """

    family = "sum"

    def __init__(self, *potentials: str | Path | nn.Module):
        super().__init__()
        if len(potentials) < 2:
            raise ValueError(f"A sum needs two potentials at least; got {len(potentials)}.")
        first = as_potential(potentials[0])
        others = [as_potential(p, device=first.device, dtype=first.dtype) for p in potentials[1:]]
        self.parts = nn.ModuleList([first, *others])
        for part in self:
            if not part.conservative:
                raise NotImplementedError(
                    f"The {part.family} potential predicts its forces directly, and they are no gradient of an energy "
                    "that could be added to another: leave it out of the sum."
                )
        self.cutoff = max(part.cutoff for part in self)
        known = [part.atomic_numbers for part in self if part.atomic_numbers is not None]
        self.atomic_numbers = frozenset.intersection(*known) if known else None
        self.inputs = frozenset().union(*(part.inputs for part in self))
        every = [set(part.atomic_properties) for part in self]
        self.atomic_properties = tuple(
            name
            for name, enough in (("energies", all), ("magmoms", any))
            if enough(name in properties for properties in every)
        )
        main = self.trained or self
        self.licence, self.native_name, self.metadata = main.licence, main.native_name, dict(main.metadata)

    def __iter__(self) -> Any:
        return iter(self.parts)

    @property
    def trained(self) -> Potential | None:
        """The first part with weights, whose family's file is written."""
        return next((part for part in self if any(True for _ in part.parameters())), None)

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        offsets = edges.offsets(structures)
        found = [part(structures, self._edges_of(part, structures, edges, offsets)) for part in self]
        atomic = [f.atomic_energies for f in found if f.atomic_energies is not None]
        return Prediction(
            torch.stack([f.energy for f in found]).sum(0),
            atomic_energies=torch.stack(atomic).sum(0) if len(atomic) == len(found) else None,
            magmoms=next((f.magmoms for f in found if f.magmoms is not None), None),
        )

    def _edges_of(self, part: Potential, structures: Structures, edges: Edges, offsets: Tensor) -> Edges:
        if part.cutoff == self.cutoff:
            return edges
        near = edges.near(part.cutoff, structures)
        # The offsets may be a leaf of their own, at which the stress arrives.
        return edges.select(near).with_offsets(offsets[near])

    def check(self, structures: Structures) -> None:
        super().check(structures)
        for part in self:
            part.check(structures)

    def layers(self) -> list[list[str]]:
        """Names of the weights, layer by layer, of the parts one after another."""
        return [
            [f"parts.{k}.{name}" for name in names]
            for k, part in enumerate(self)
            if any(True for _ in part.parameters())
            for names in layers(part)
        ]

    @classmethod
    def from_name(cls, variant: str | None) -> Potential:
        raise ValueError("A sum is called by its parts, as chgnet+d3 or mace:medium+d3:pbe:bj.")

    def as_stored(self) -> SumPotential:
        return self._of([part.as_stored() for part in self])

    @property
    def form(self) -> str:
        return "+".join(part.form for part in self) if any(part.form for part in self) else ""

    def in_form(self, form: str) -> SumPotential:
        forms = form.split("+") if form else [""] * len(self.parts)
        return self._of([part.in_form(of) for part, of in zip(self, forms, strict=True)])

    def _of(self, parts: list[Potential]) -> SumPotential:
        if all(a is b for a, b in zip(parts, self, strict=True)):
            return self
        made = SumPotential(*parts)
        made.metadata = self.metadata
        return made

    def config(self) -> dict[str, Any]:
        return {"parts": [{"family": part.family, "config": part.config()} for part in self]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SumPotential:
        return cls(*(family(part["family"]).from_config(part["config"]) for part in config["parts"]))

    def save_native(self, path: Path) -> None:
        """The trained part alone; the family's own tools have to add the others."""
        main = self.trained
        assert main is not None
        metadata, main.metadata = main.metadata, self.metadata
        try:
            main.save_native(path)
        finally:
            main.metadata = metadata
