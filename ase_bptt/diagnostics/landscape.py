"""The potential-energy surface around some pairs: its minima, the settling of a descent, and errors of forces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ..adjoints.backward_sweep import Frames
from ..displacements import known_part
from ..evaluation.row import farthest
from ..iterated_map import Status
from ..losses import SAME_END, delta_q
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..result import Relaxation
from ..steppers import Stepper
from ..structures import Structures
from ..throughput import single_points

RATTLE = 0.1
"""Å, standard deviation of each coordinate: a start as plausible as the one that was given."""
SAME_ENERGY = 0.005
"""eV per atom: ends that differ by more are two minima, however near."""
LEFT = 0.3
"""Å: where the potential moves an atom of the reference farther than this, it has no minimum there."""
SETTLED = 0.1
"""Delta-Q within this share of its last value has settled."""
SETTLED_AT_LEAST = 0.05
"""amu^1/2 Å: Delta-Q has also settled within this distance of its last value, however small that value is."""
STRONG = 0.1
"""eV/Å: the direction of forces is compared on structures whose largest reference force is above."""
MOST_FRAMES = 200
"""Frames of the descent whose settling is measured."""
TOGETHER = 16
"""Structures relaxed in one batch, as in `evaluate`."""
Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""


@dataclass(frozen=True)
class Minima:
    """Ends of relaxations from rattled starts of one pair.

    Attributes
    ----------
    id : str
    ends : int
        Distinct ends, including that of the unrattled start.
    energies : int
        Distinct energies of these ends; fewer where some differ by a symmetry only.
    reference : bool or None
        Whether one of them is the end of the relaxation from the reference; None where that relaxation moves by
        more than `LEFT`.
    """

    id: str
    ends: int
    energies: int
    reference: bool | None


def minima(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    rattles: int,
    seed: int,
    fmax: float = 0.02,
    steps: int = 500,
    report: Progress = lambda done, total: None,
) -> list[Minima]:
    """Relax from rattled starts by FIRE and count the distinct ends, for each pair.

    Only converged relaxations count. The list is empty for ``rattles=0``.
    """
    if not rattles:
        return []
    starts = [start for k, pair in enumerate(pairs) for start in _starts(pair, rattles, [seed, k])]
    cells = [pair.freedom for pair in pairs for _ in range(rattles + 2)]
    ends: list[Atoms | None] = []
    for first in range(0, len(starts), TOGETHER):
        part = slice(first, first + TOGETHER)
        with torch.no_grad():
            run = relax(potential, starts[part], stepper="fire", fmax=fmax, steps=steps, cell=cells[part])
        found = zip(run.to_atoms(), run.status, strict=True)
        ends += [atoms if status is Status.CONVERGED else None for atoms, status in found]
        report(len(ends), len(starts))
    size = rattles + 2
    return [_count(pair, ends[k * size : (k + 1) * size]) for k, pair in enumerate(pairs)]


def _starts(pair: RelaxationPair, rattles: int, seed: list[int]) -> list[Atoms]:
    """The reference, the start, and the start rattled."""
    generator = np.random.default_rng(seed)
    starts = [pair.relaxed, pair.initial]
    for _ in range(rattles):
        atoms = pair.initial.copy()
        atoms.set_positions(atoms.positions + generator.normal(scale=RATTLE, size=atoms.positions.shape))
        starts.append(atoms)
    return starts


def _count(pair: RelaxationPair, ends: Sequence[Atoms | None]) -> Minima:
    control, *found = ends
    distinct: list[Atoms] = []
    for end in found:
        if end is not None and not any(_same(end, other) for other in distinct):
            distinct.append(end)
    levels: list[float] = []
    for energy in (atoms.get_potential_energy() / len(atoms) for atoms in distinct):
        if all(abs(energy - other) > SAME_ENERGY for other in levels):
            levels.append(energy)
    if control is None or not farthest(control, known_part(control, pair.relaxed)) < LEFT:
        return Minima(pair.id, len(distinct), len(levels), None)
    met = any(farthest(end, control) < SAME_END for end in distinct)
    return Minima(pair.id, len(distinct), len(levels), met)


def _same(a: Atoms, b: Atoms) -> bool:
    apart = abs(a.get_potential_energy() - b.get_potential_energy()) / len(a)
    return apart <= SAME_ENERGY and farthest(a, b) < SAME_END


@dataclass(frozen=True)
class Settling:
    """The number of frames after which one relaxation has settled.

    Attributes
    ----------
    id : str
    frames : int or None
        After this frame Delta-Q to the reference stays near its last value; None where it diverged.
    finished : bool
        Whether its forces vanished within `MOST_FRAMES`.
    """

    id: str
    frames: int | None
    finished: bool


def settling(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    stepper: Stepper,
    *,
    fmax: float = 0.01,
    report: Progress = lambda done, total: None,
) -> list[Settling]:
    """Relax by the stepper, and find the frame after which Delta-Q changes little, for each pair."""
    found: list[Settling] = []
    for first in range(0, len(pairs), TOGETHER):
        found += _settling(potential, pairs[first : first + TOGETHER], stepper, fmax)
        report(len(found), len(pairs))
    return found


def _settling(
    potential: Potential, pairs: Sequence[RelaxationPair], stepper: Stepper, fmax: float
) -> Iterator[Settling]:
    start, reference = (potential.batch(atoms) for atoms in ([p.initial for p in pairs], [p.relaxed for p in pairs]))
    # So that relax keeps the frames.
    start.positions.requires_grad_()
    with torch.enable_grad():
        run = relax(potential, start, stepper=stepper, fmax=fmax, steps=MOST_FRAMES, cell=[p.freedom for p in pairs])
    for pair, path, status in zip(pairs, _paths(run, reference), run.status, strict=True):
        diverged = status is Status.DIVERGED
        yield Settling(pair.id, None if diverged else _settled(path), status is Status.CONVERGED)


def _paths(run: Relaxation, reference: Structures) -> list[list[float]]:
    """Delta-Q of each structure before each of its frames, and at its end."""
    trajectory, frames = run.trajectory, Frames(run.trajectory)
    paths: list[list[float]] = [[] for _ in run.status]
    for t in range(len(trajectory.frames)):
        moving = trajectory.moving(t)
        if moving:
            there = trajectory.start.select(moving).replace(positions=frames.before(t)[0]).placed()
            found = delta_q(there, reference.select(moving), cell_weight=1.0)
            for k, distance in zip(moving, found.tolist(), strict=True):
                paths[k].append(distance)
    for path, distance in zip(paths, delta_q(run, reference, cell_weight=1.0).tolist(), strict=True):
        path.append(distance)
    return paths


def _settled(path: Sequence[float]) -> int:
    near = max(SETTLED * path[-1], SETTLED_AT_LEAST)
    return 1 + max((t for t, distance in enumerate(path) if not abs(distance - path[-1]) <= near), default=-1)


@dataclass(frozen=True)
class ForceError:
    """Errors of the potential's forces against the reference's, over all components.

    Attributes
    ----------
    frames : int
        Structures with reference forces.
    error, reference : float
        Mean absolute error and mean absolute reference force, eV/Å.
    strong : int
        How many of the structures have a reference force above `STRONG`; what follows is of these alone.
    strong_error, strong_reference : float or None
        The same means; None where there is no such structure.
    cosine : float or None
        Between the vectors of all forces of the potential and all forces of the reference.
    """

    frames: int
    error: float
    reference: float
    strong: int
    strong_error: float | None
    strong_reference: float | None
    cosine: float | None


def reference_forces(atoms: Atoms) -> np.ndarray | None:
    """Forces (n_atoms, 3) in eV/Å that were read with the structure; None without, or if it has moved since."""
    calculator = atoms.calc
    if not isinstance(calculator, SinglePointCalculator):
        return None
    forces = calculator.get_property("forces", atoms, allow_calculation=False)
    return forces if forces is not None and np.isfinite(forces).all() else None


def force_error(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    report: Progress = lambda done, total: None,
) -> ForceError | None:
    """Compare forces at all initial and relaxed structures that carry forces; None where none does."""
    labelled = [
        (atoms, forces)
        for pair in pairs
        for atoms in (pair.initial, pair.relaxed)
        if (forces := reference_forces(atoms)) is not None
    ]
    if not labelled:
        return None
    references = [forces for _, forces in labelled]
    found: list[np.ndarray] = []
    for batch, _, there in single_points(potential, [atoms for atoms, _ in labelled]):
        found += [f.numpy() for f in there.double().cpu().split(batch.counts)]
        report(len(found), len(labelled))
    strong = [k for k, forces in enumerate(references) if np.linalg.norm(forces, axis=1).max() > STRONG]
    error, reference = _means(found, references)
    strong_error, strong_reference = _means([found[k] for k in strong], [references[k] for k in strong])
    return ForceError(
        frames=len(labelled),
        error=error or 0.0,
        reference=reference or 0.0,
        strong=len(strong),
        strong_error=strong_error,
        strong_reference=strong_reference,
        cosine=_cosine([found[k] for k in strong], [references[k] for k in strong]),
    )


def _means(found: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    if not found:
        return None, None
    a, b = np.concatenate(found), np.concatenate(references)
    return float(np.abs(a - b).mean()), float(np.abs(b).mean())


def _cosine(found: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float | None:
    if not found:
        return None
    a, b = np.concatenate(found).ravel(), np.concatenate(references).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0
