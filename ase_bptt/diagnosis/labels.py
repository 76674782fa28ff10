"""A potential's forces beside those that the structures of the pairs carry, where they carry any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ..pairs import RelaxationPair
from ..potential import Potential
from ..singlepoint import single_points

STRONG = 0.1
"""eV/Å: a structure whose largest reference force is below says nothing of the direction of forces."""


@dataclass(frozen=True)
class ForceError:
    """The potential's forces against the reference's, over all components.

    Attributes
    ----------
    frames : int
        Structures with reference forces.
    error, reference : float
        Mean absolute error and mean absolute reference force, eV/Å.
    strong : int
        How many of the structures have a reference force above `STRONG`. The rest is of these alone.
    strong_error, strong_reference : float or None
        The same means; None where there is no such structure.
    cosine : float or None
        Of the angle between all forces of the potential and all forces of the reference.
    """

    frames: int
    error: float
    reference: float
    strong: int
    strong_error: float | None
    strong_reference: float | None
    cosine: float | None


def reference_forces(atoms: Atoms) -> np.ndarray | None:
    """The forces (n_atoms, 3) in eV/Å that were read with the structure; None without, or if it moved since."""
    calculator = atoms.calc
    if not isinstance(calculator, SinglePointCalculator):
        return None
    forces = calculator.get_property("forces", atoms, allow_calculation=False)
    return forces if forces is not None and np.isfinite(forces).all() else None


def force_error(
    potential: Potential,
    pairs: Sequence[RelaxationPair],
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ForceError | None:
    """Compare the forces at all initial and relaxed structures that carry forces; None where none does."""
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
