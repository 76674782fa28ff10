"""Snapshots of a potential: its answers on probes, crystals and dimers, of which a drift report compares two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pairs import RelaxationPair
from ..potential import Potential
from ..terms.labelled_frames import evenly, has_labels
from ..terms.probes import Targets, chosen_crystals, make_probes
from ..throughput import single_points
from ..utils import replacing
from .curves import Curve, Elastic, chosen_dimers, dimer_curves, elastic

SEED = 1
"""Of the probes of a snapshot: other draws than those of the distillation term, whose seed is 0."""
FRAMES = 8
"""Frames of each reference relaxation on which forces are compared, at most."""


@dataclass(frozen=True)
class ProbeResult:
    """A probe's kind and name, the potential's energy there in eV, and its forces in eV/Å, a row for each atom."""

    kind: str
    name: str
    energy: float
    forces: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Snapshot:
    """What a potential finds on probes, crystals and dimers.

    Attributes
    ----------
    probes : tuple of ProbeResult
    crystals : dict of str to Elastic
    dimers : dict of str to Curve
    force_error : float or None
        Mean absolute error of a force's component on frames of the pairs, eV/Å; None where these hold no forces.
    """

    probes: tuple[ProbeResult, ...]
    crystals: dict[str, Elastic]
    dimers: dict[str, Curve]
    force_error: float | None = None

    def write(self, path: str | Path) -> None:
        """Write it as JSON, exactly: NaN stays NaN, which Python's own JSON reads."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Snapshot:
        """The snapshot that `write` wrote."""
        found: dict[str, Any] = json.loads(Path(path).read_text())
        return cls(
            tuple(ProbeResult(**row | {"forces": tuple(map(tuple, row["forces"]))}) for row in found["probes"]),
            {name: Elastic(**row) for name, row in found["crystals"].items()},
            {name: Curve(*(tuple(row[key]) for key in ("distances", "energies")))
             for name, row in found["dimers"].items()},
            found["force_error"],
        )  # fmt: skip


def take_snapshot(
    potential: Potential, pairs: Sequence[RelaxationPair] = (), *, size: int = 24, seed: int = SEED
) -> Snapshot:
    """Evaluate a potential on probes, crystals and dimers.

    Parameters
    ----------
    potential : Potential
    pairs : sequence of RelaxationPair
        Their rattled structures are probes, their elements make the dimers (without pairs, those of the crystals), and
        the forces on their frames are compared with the reference's.
    size, seed : int
        Of the probe set, as for `make_probes`.

    Examples
    --------
    >>> from ase_bptt import load_potential
    >>> from ase_bptt.drift import take_snapshot
    >>> snapshot = take_snapshot(load_potential("emt"), size=2)
    >>> print(f"{snapshot.crystals['Cu'].lattice_constant:.2f} Å, {snapshot.crystals['Cu'].bulk_modulus:.0f} GPa")
    3.59 Å, 134 GPa
    """
    probes = make_probes(potential, pairs, size=size, seed=seed)
    crystals = chosen_crystals(potential)
    dimers = chosen_dimers([p.initial for p in pairs] or [c.atoms() for c in crystals])
    answers = []
    if probes:
        targets = Targets.of(potential, [probe.atoms for probe in probes])
        forces = targets.forces.double().cpu().split(targets.structures.counts)
        energies = targets.energies.double().cpu().tolist()
        answers = [
            ProbeResult(probe.kind, probe.name, energy, tuple(map(tuple, np.asarray(f).tolist())))
            for probe, energy, f in zip(probes, energies, forces, strict=True)
        ]
    curves = elastic(potential, crystals), dimer_curves(potential, dimers)
    return Snapshot(tuple(answers), *curves, _force_error(potential, pairs))


def _force_error(potential: Potential, pairs: Sequence[RelaxationPair]) -> float | None:
    frames = [a for p in pairs for a in evenly([a for a in p.frames if has_labels(a, False)], FRAMES)]
    if not frames:
        return None
    found = torch.cat([forces.double().cpu() for _, _, forces in single_points(potential, frames)])
    return float(np.abs(found.numpy() - np.concatenate([a.calc.results["forces"] for a in frames])).mean())
