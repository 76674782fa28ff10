"""Checks of what autograd is asked for: gradients of a function of the forces, and what must stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .case import Case, array, slope


def second(case: Case) -> None:
    """The gradient of a function of the forces in positions and weights is its difference."""
    structures, pairs = case.batch(case.atoms)
    if not len(pairs.i):
        case.report.skipped[case.check] = "no atom of the structure has a neighbour"
        return
    positions = structures.positions.requires_grad_()
    along = torch.from_numpy(case.random.normal(size=positions.shape)).to(positions)
    with torch.enable_grad():
        _, forces = case.potential.energy_and_forces(structures, pairs, create_graph=True)
    if not forces.requires_grad:
        case.fail("energy_and_forces with create_graph=True gave forces without a graph")
    weights = dict(case.potential.named_parameters())
    found = torch.autograd.grad((forces * along).sum(), [positions, *weights.values()], allow_unused=True)
    case.report.unreached = tuple(n for n, g in zip(weights, found[1:], strict=True) if g is None or not g.any())
    _of_positions(case, found[0], array(along))
    if weights:
        if len(case.report.unreached) == len(weights):
            case.fail("no weight has a gradient")
        _of_weights(case, found[1:], array(along))


def _of_positions(case: Case, gradient: Tensor | None, along: np.ndarray) -> None:
    if gradient is None:
        case.fail("the forces do not depend on the positions for autograd")

    def scalar(direction: np.ndarray, step: float) -> float:
        moved = case.atoms.copy()
        moved.positions += step * direction
        return float((case.forces(moved) * along).sum())

    _along_directions(case, "gradient positions", array(gradient), scalar)


def _of_weights(case: Case, gradients: tuple[Tensor | None, ...], along: np.ndarray) -> None:
    weights = list(case.exact.parameters())
    # Weights differ in size by orders: each tensor is measured in units of its own.
    units = [float(w.detach().square().mean().sqrt()) or 1.0 for w in weights]
    before = [w.detach().clone() for w in weights]
    pieces = [
        np.zeros(w.shape) if g is None else unit * array(g)
        for w, g, unit in zip(weights, gradients, units, strict=True)
    ]
    splits = np.cumsum([piece.size for piece in pieces])[:-1]

    def scalar(direction: np.ndarray, step: float) -> float:
        for w, value, unit, d in zip(weights, before, units, np.split(direction, splits), strict=True):
            w.data.copy_(value + step * unit * torch.from_numpy(d.reshape(w.shape)).to(value))
        found = float((case.forces(case.atoms) * along).sum())
        for w, value in zip(weights, before, strict=True):
            w.data.copy_(value)
        return found

    _along_directions(case, "gradient weights", np.concatenate([p.ravel() for p in pieces]), scalar)


def _along_directions(
    case: Case, name: str, gradient: np.ndarray, scalar: Callable[[np.ndarray, float], float]
) -> None:
    """Compare along the gradient itself, and along a random direction, which finds what is missing from it."""
    length, worst = float(np.linalg.norm(gradient)), 0.0
    random = case.random.normal(size=gradient.shape)
    for direction in (gradient, random):
        size = np.linalg.norm(direction)
        if not size > 0:
            continue
        unit = direction / size
        expected = slope(partial(scalar, unit))
        scale = max(length, abs(expected))
        if scale:
            worst = float(np.maximum(worst, np.abs((gradient * unit).sum() - expected) / scale))
    case.measure(name, "gradient", worst, f"its second derivatives ({name})", "differences of its forces")


def untouched(case: Case) -> None:
    """Flags, gradients and values of the weights, and the positions that are given, are left as they are."""
    potential = case.potential
    weights = dict(potential.named_parameters())
    for k, weight in enumerate(weights.values()):
        weight.requires_grad_(k % 2 == 0)
    before = {name: (w.requires_grad, w.detach().clone()) for name, w in weights.items()}
    mode = potential.training
    structures, pairs = case.batch(case.atoms)
    positions = structures.positions.clone()
    potential.results(structures, pairs)
    potential.energy_and_forces(structures, pairs)
    if structures.positions.requires_grad or not torch.equal(positions, structures.positions):
        case.fail("it changed the positions that it was given, or what they require")
    potential.energy_and_forces(structures.replace(positions=positions.requires_grad_()), pairs, create_graph=True)
    for name, weight in weights.items():
        flag, value = before[name]
        if weight.requires_grad is not flag or weight.grad is not None or not torch.equal(weight, value):
            case.fail(f"it changed requires_grad, the gradient or the value of its weight {name}")
    if potential.training is not mode:
        case.fail("it changed between training and evaluation mode")
    potential.requires_grad_()
