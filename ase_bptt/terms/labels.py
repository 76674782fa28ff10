"""Energy and force labels of the reference relaxations as a term of the loss, and the frames that carry them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..losses import root_delta_q
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..steppers import GradientDescent
from ..utils import check_count, check_positive
from .probes import Targets, energies_and_forces, label_loss

log = logging.getLogger(__name__)


class Labels:
    """Energy and force labels of the frames of the reference relaxations, and the distance from their path.

    Frames without labels, or with labels of other positions, are skipped; a pair without any labelled frame
    contributes nothing. For a pair without ``frames`` the labels of its initial and relaxed structures are used.

    Parameters
    ----------
    weight : float
    energies : bool
        Match energies, too: per atom, less an energy for each element, since each method has its own zero of energy.
        The element energies are fitted by least squares to the differences from the potential, each as it was when
        its frame was last drawn: fitted once, they would tie the potential to the zero it started with. With False,
        frames with forces alone are used, too.
    per_pair : int
        Labelled frames of each pair of a batch that are matched, drawn at random in each step.
    frames : int
        Frames that are kept of each relaxation, evenly spaced from the first to the last.
    path : float
        Weight of the path. From the initial structure of each pair of a batch a relaxation of several legs is run;
        for each reference frame that is still ahead, the last included, the smallest distance (`root_delta_q`) to
        the end of a leg is taken, and the mean over the frames is added. Zero leaves it out.
    legs, steps : int
        Legs of the path, and frames of each, by plain gradient descent.
    required : bool
        Refuse pairs of which none has a labelled frame; otherwise the term is then zero.
    """

    name: ClassVar[str] = "reference"

    def __init__(
        self,
        weight: float = 1.0,
        *,
        energies: bool = True,
        per_pair: int = 1,
        frames: int = 8,
        path: float = 0.0,
        legs: int = 4,
        steps: int = 3,
        required: bool = True,
    ):
        check_positive(weight=weight)
        check_count(per_pair=per_pair, frames=frames, legs=legs, steps=steps)
        if path < 0:
            raise ValueError(f"The weight of the path must not be negative, got {path}.")
        self.weight, self.energies, self.per_pair, self.frames = weight, energies, per_pair, frames
        self.path, self.legs, self.steps, self.required = path, legs, steps, required
        self._elements: list[int] = []
        self._counts = np.zeros((0, 0))
        self._differences = np.zeros(0)
        self._targets: Targets | None = None
        self._rows: dict[str, range] = {}
        self._kept = LabelledFrames([], frames)
        self._loaded: np.ndarray | None = None

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Read the frames.

        Raises
        ------
        ValueError
            Where no pair has a frame with energy and forces, or a frame holds other atoms than its pair.
        """
        # Reading frames from files is slow, and the same pairs are checked more than once before a training.
        if self._kept.pairs != list(pairs):
            self._kept = LabelledFrames(pairs, self.frames, self.energies)
        if self.required and not self._kept.labelled:
            wanted = "energy and forces" if self.energies else "forces"
            raise ValueError(
                f"None of the training pairs has a frame with {wanted}: read them from files that hold "
                "those (vasprun.xml, OUTCAR, .pwo, extxyz, .traj), or leave the labels (reference) out."
            )

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Read the frames, and evaluate the potential there, unless `load` restored the differences of energy.

        Raises
        ------
        ValueError
            As `check` does, and where a run is resumed with other frames.
        """
        self.check(pairs)
        found = self._kept.labelled
        if not found:
            return
        first = 0
        for name, frames in found.items():
            self._rows[name] = range(first, first := first + len(frames))
        every = [a for frames in found.values() for a in frames]
        self._targets = _targets(potential, every)
        self._elements = sorted({int(z) for a in every for z in a.numbers})
        self._counts = np.array([[np.count_nonzero(a.numbers == z) for z in self._elements] for a in every], float)
        if not self.energies:
            return
        if self._loaded is None:
            self._differences = (self._targets.energies - Targets.of(potential, every).energies).double().cpu().numpy()
        elif len(self._loaded) != len(every):
            raise ValueError(
                "When the run started its labels were read from other frames: give those again, or start a new run."
            )
        else:
            self._differences = self._loaded.copy()

    @property
    def offsets(self) -> dict[int, float]:
        """Energy in eV per atom of each element (by atomic number) that is subtracted from the labels."""
        return dict(zip(self._elements, self._fitted().tolist(), strict=True)) if len(self._differences) else {}

    def _fitted(self) -> np.ndarray:
        # Energies are compared per atom, so they are fitted per atom.
        sizes = self._counts.sum(axis=1)
        return np.linalg.lstsq(self._counts / sizes[:, None], self._differences / sizes, rcond=None)[0]

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """`label_loss` at labelled frames of the batch's pairs, and the distance from the path; without a unit."""
        chosen: list[int] = []
        for pair in pairs:
            rows = self._rows.get(pair.id, range(0))
            chosen += sorted(rng.choice(rows, min(self.per_pair, len(rows)), replace=False).tolist() if rows else [])
        total = torch.zeros((), dtype=potential.dtype, device=potential.device)
        if chosen and self._targets is not None:
            total = self._matched(potential, self._targets.select(chosen), chosen)
        if self.path:
            total = total + self.path * self._path_distance(potential, pairs)
        return total

    def _matched(self, potential: Potential, targets: Targets, chosen: list[int]) -> Tensor:
        energy, forces = energies_and_forces(potential, targets.structures)
        if not self.energies:
            return label_loss(targets, energy, forces, energies=False)
        now = (targets.energies - energy.detach()).double().cpu().numpy()
        if np.isfinite(now).all():
            self._differences[chosen] = now
        offsets = targets.energies.new_tensor(self._counts[chosen] @ self._fitted())
        return label_loss(replace(targets, energies=targets.energies - offsets), energy, forces)

    def _path_distance(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> Tensor:
        """Mean distance (`root_delta_q`) of the reference frames that are ahead from the nearest end of a leg."""
        structures = potential.batch([p.initial for p in pairs])
        ends = []
        for _ in range(self.legs):
            run = relax(potential, structures, stepper=GradientDescent(), fmax=0.0, steps=self.steps)
            structures = structures.replace(positions=run.positions)
            ends.append(structures)
        means = []
        for k, pair in enumerate(pairs):
            # The initial structure may lie anywhere on the path: frames before it need not be passed again.
            ahead = _ahead(pair, self._kept.every[pair.id])
            reference = potential.batch(ahead)
            distances = torch.stack([root_delta_q(end.select([k] * len(ahead)), reference) for end in ends])
            means.append(distances.amin(0).mean())
        found = torch.stack(means)
        found = found[torch.isfinite(found.detach())]
        return found.mean() if len(found) else structures.positions.new_zeros(())

    def state(self) -> dict[str, Any]:
        """The latest differences of energy from the potential; the frames are read again."""
        return {"differences": torch.from_numpy(self._differences.copy())}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; call it before `prepare`."""
        self._loaded = state["differences"].numpy()

    def todict(self) -> dict[str, Any]:
        names = ("name", "weight", "energies", "per_pair", "frames", "path", "legs", "steps", "required")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        labelled = self._kept.labelled
        if not labelled:
            return "none, for no frame has an energy and forces: structures alone"
        n = sum(map(len, labelled.values()))
        return f"energies and forces of {n} frames of {len(labelled)} of {len(self._kept.pairs)} training pairs"


def _targets(potential: Potential, frames: Sequence[Atoms]) -> Targets:
    """The frames with the reference's own energies and forces."""
    structures = potential.batch(frames)
    like = structures.positions
    forces = np.concatenate([a.calc.results["forces"] for a in frames])
    # float32 has too few digits for DFT's total energies; their differences may be rounded.
    return Targets(
        structures, like.new_tensor([energy_of(a) for a in frames], dtype=torch.float64), like.new_tensor(forces)
    )


def _ahead(pair: RelaxationPair, frames: Sequence[Atoms]) -> list[Atoms]:
    """The frames that are nearer to the relaxed structure than the initial one is, and the relaxed one."""
    start, *distances = root_delta_q([pair.initial, *frames], [pair.relaxed] * (len(frames) + 1)).tolist()
    return [a for a, d in zip(frames, distances, strict=True) if 0 < d < start] + [pair.relaxed]


MOVED = {"positions", "numbers", "cell"}
"""Changes of a structure, as ASE names them, after which its calculator's results no longer belong to it."""


class LabelledFrames:
    """Frames of reference relaxations, evenly spaced from the first to the last, by the pair's id.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    most : int
        Frames of each.
    energies : bool
        Whether a labelled frame needs an energy, or forces alone suffice.

    Attributes
    ----------
    pairs : list of RelaxationPair
    every : dict of str to list of Atoms
    labelled : dict of str to list of Atoms
        Frames with finite labels that belong to their positions; pairs without any are not in it.

    Raises
    ------
    ValueError
        For two pairs of one name, and a frame that holds other atoms than its pair.
    """

    def __init__(self, pairs: Sequence[RelaxationPair], most: int, energies: bool = True):
        self.pairs = list(pairs)
        self.every: dict[str, list[Atoms]] = {}
        self.labelled: dict[str, list[Atoms]] = {}
        for pair in _each_once(pairs):
            frames = _frames_of(pair)
            self.every[pair.id] = evenly(frames, most)
            labelled = evenly([a for a in frames if has_labels(a, energies)], most)
            if labelled:
                self.labelled[pair.id] = labelled


def energy_of(atoms: Atoms) -> float:
    """The energy in eV of which the forces are the negative gradient, if the file holds one, else NaN."""
    results = atoms.calc.results
    return float(results.get("free_energy", results.get("energy", np.nan)))


def _each_once(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    every: dict[str, RelaxationPair] = {}
    for pair in pairs:
        if every.setdefault(pair.id, pair).relaxed is not pair.relaxed:
            raise ValueError(f"Two training pairs are called {pair.id!r}: give each a name of its own.")
    return list(every.values())


def _frames_of(pair: RelaxationPair) -> list[Atoms]:
    frames = list(pair.frames) or [pair.initial, pair.relaxed]
    wrong = next((k for k, a in enumerate(frames) if not np.array_equal(a.numbers, pair.relaxed.numbers)), None)
    if wrong is not None:
        raise ValueError(
            f"{pair.id}: its frame {wrong} is {frames[wrong].symbols} and not {pair.relaxed.symbols}; "
            "give the frames of this relaxation, with their atoms in the same order."
        )
    return frames


def has_labels(atoms: Atoms, energies: bool) -> bool:
    """Whether a frame has finite forces (and an energy) that belong to its positions."""
    results = getattr(atoms.calc, "results", {})
    if "forces" not in results or not np.isfinite(results["forces"]).all():
        return False
    # A calculator shared by several structures holds the results of the last one.
    moved = MOVED & {*atoms.calc.check_state(atoms)} if hasattr(atoms.calc, "check_state") else ()
    return not moved and (not energies or bool(np.isfinite(energy_of(atoms))))


def evenly(frames: Sequence[Atoms], most: int) -> list[Atoms]:
    """At most so many, the first and the last included."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    return [frames[k] for k in chosen] if len(frames) else []
