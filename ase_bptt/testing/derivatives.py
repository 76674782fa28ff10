"""Checks of derivatives: that autograd reaches all that the energy depends on, and agrees with finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..neighbors import Edges
from ..potential import Potential
from ..structures import Structures
from .case import Case, array, derivative

NO_NEIGHBOURS = "no atom of the structure has a neighbour"
NUDGE = 1e-5
"""Relative change of a weight that must show in the energy, if the energy depends on it."""


def graph(case: Case) -> None:
    """Autograd reaches positions and weights from the energy, or from forces that are predicted directly."""
    structures, edges = case.batch(case.atoms)
    if not len(edges.i):
        case.report.skipped[case.check] = NO_NEIGHBOURS
        return
    weights, what = dict(case.potential.named_parameters()), "energy" if case.potential.conservative else "forces"
    positions = structures.positions.requires_grad_()
    with torch.enable_grad():
        if case.potential.conservative:
            value = case.potential(structures, edges).energy
        else:
            value = case.potential.energy_and_forces(structures, edges, create_graph=True)[1]
    if not value.requires_grad:
        case.fail(f"its {what} has no graph" if case.potential.conservative else f"its {what} have no graph")
    # Unequal, since forces sum to zero.
    along = torch.linspace(1, 2, value.numel()).to(value).view_as(value)
    found = torch.autograd.grad((value * along).sum(), [positions, *weights.values()], allow_unused=True)
    if found[0] is None:
        case.fail(f"autograd does not reach the positions from its {what}")
    missed = [name for name, gradient in zip(weights, found[1:], strict=True) if gradient is None or not gradient.any()]
    if weights and len(missed) == len(weights):
        case.fail(f"autograd reaches none of its weights from its {what}")
    cut = _with_effect(case, missed)
    if cut:
        case.fail(f"its {what} depends on the weight {cut}, which autograd does not reach")


def _with_effect(case: Case, names: Sequence[str]) -> str | None:
    """The first of these weights on which the energy, or the predicted forces, depend."""

    def changes(some: Sequence[str]) -> bool:
        before = {name: weights[name].detach().clone() for name in some}
        for name, value in before.items():
            size = value.square().mean().sqrt() or 1.0
            weights[name].data.add_(NUDGE * size * torch.linspace(1, 2, value.numel()).to(value).view_as(value))
        now = value_of()
        for name, value in before.items():
            weights[name].data.copy_(value)
        return not np.allclose(now, usual, rtol=0, atol=1e-9)

    def value_of() -> np.ndarray:
        return np.asarray(case.energy(case.atoms)) if case.potential.conservative else case.forces(case.atoms)

    if not names:
        return None
    weights, usual = dict(case.exact.named_parameters()), value_of()
    return next((name for name in names if changes([name])), None) if changes(names) else None


def forces(case: Case) -> None:
    """Forces are the negative gradient of the energy."""
    if not case.potential.conservative:
        case.report.skipped[case.check] = "its forces are predicted directly, and are not the gradient of its energy"
        return
    found, worst = case.results(case.atoms)["forces"], 0.0
    for direction in _signs(case, 3, found.shape):

        def energy(step: float, direction: np.ndarray = direction) -> float:
            moved = case.atoms.copy()
            moved.positions += step * direction
            return case.energy(moved)

        # Every atom moves: one wrong component cannot hide, and the error is that of a single one.
        error = (
            np.abs((found * direction).sum() + derivative(energy)) / np.sqrt(found.size) / max(1.0, np.abs(found).max())
        )
        worst = float(np.maximum(worst, error))
    case.measure(case.check, "derivative", worst, "its forces", "the negative gradient of its energy, by differences")


def stress(case: Case) -> None:
    """The stress is the derivative of the energy with respect to strain, over the volume."""
    reason = _no_stress(case)
    if reason:
        case.report.skipped[case.check] = reason
        return
    found, worst = case.results(case.atoms)["stress"][0], 0.0
    for signs in _signs(case, 3, (3, 3)):
        direction = (signs + signs.T) / 2

        def energy(step: float, direction: np.ndarray = direction) -> float:
            return case.energy(_strained(case.atoms, step * direction))

        expected = derivative(energy) / case.atoms.get_volume()
        error = np.abs((found * direction).sum() - expected) / max(1.0, np.abs(found).max())
        worst = float(np.maximum(worst, error))
    what = "the derivative of its energy with respect to strain over the volume, by differences"
    case.measure(case.check, "strain", worst, "the components of its stress", what)


def _no_stress(case: Case) -> str:
    if not case.potential.conservative:
        return "its forces are predicted directly, and it has no stress"
    return "the structure has no volume" if case.atoms.cell.rank < 3 else ""


def _strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    found = atoms.copy()
    found.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return found


def second(case: Case) -> None:
    """The gradient of a function of the forces, in positions and weights, agrees with finite differences."""
    structures, edges = case.batch(case.atoms)
    if not len(edges.i):
        case.report.skipped[case.check] = NO_NEIGHBOURS
        return
    positions = structures.positions.requires_grad_()
    along = torch.from_numpy(case.random.normal(size=positions.shape)).to(positions)
    with torch.enable_grad():
        _, forces = case.potential.energy_and_forces(structures, edges, create_graph=True)
    if not forces.requires_grad:
        case.fail("energy_and_forces with create_graph=True gave forces without a graph")

    def scalar(atoms: Atoms) -> float:
        return float((case.forces(atoms) * array(along)).sum())

    found = _gradients(case, (forces * along).sum(), [positions], "its forces", ["the positions"])
    weights = found[1:]
    names = (name for name, _ in case.potential.named_parameters())
    case.report.unreached = tuple(n for n, g in zip(names, weights, strict=True) if g is None or not g.any())
    _of_positions(case, found[0], scalar)
    _of_weights(case, weights, scalar)


def cells(case: Case) -> None:
    """The gradient of a function of the virial, in strain, positions and weights, agrees with finite differences."""
    structures, edges = case.batch(case.atoms)
    reason = _no_stress(case) or ("" if len(edges.i) else NO_NEIGHBOURS)
    if reason:
        case.report.skipped[case.check] = reason
        return
    positions = structures.positions.requires_grad_()
    strain = structures.cells.new_zeros(3, 3).requires_grad_()
    along = case.random.normal(size=(3, 3))
    virial = _virial(case.potential, structures, edges, strain, create_graph=True)
    if not virial.requires_grad:
        case.fail("the derivative of its energy with respect to strain has no graph")
    inputs, names = [strain, positions], ["the strain", "the positions"]
    found = _gradients(case, (virial * torch.from_numpy(along).to(virial)).sum(), inputs, "its virial", names)

    def scalar(atoms: Atoms, along: np.ndarray = along) -> float:
        structures, edges = case.exactly(atoms)
        zero = structures.cells.new_zeros(3, 3).requires_grad_()
        return float((array(_virial(case.exact, structures, edges, zero)) * along).sum())

    def of_strain(direction: np.ndarray, step: float) -> float:
        turned = np.eye(3) + step * direction
        # The virial of the strained structure is that with respect to a further strain.
        return scalar(_strained(case.atoms, step * direction), np.linalg.inv(turned) @ along)

    assert found[0] is not None
    _along_directions(case, "strain", array(found[0]), of_strain)
    _of_positions(case, found[1], scalar)
    _of_weights(case, found[2:], scalar)


def _virial(
    potential: Potential, structures: Structures, edges: Edges, strain: Tensor, create_graph: bool = False
) -> Tensor:
    """dE/dstrain in eV, shape (3, 3), of one structure."""
    with torch.enable_grad():
        x, c = structures.positions, structures.cells
        strained = structures.replace(positions=x + x @ strain, cells=c + c @ strain)
        (found,) = torch.autograd.grad(potential(strained, edges).energy.sum(), strain, create_graph=create_graph)
    return found


def _gradients(case: Case, value: Tensor, inputs: list[Tensor], of: str, names: list[str]) -> list[Tensor | None]:
    """With respect to these inputs, which must exist, and to all weights, some of which must."""
    weights = list(case.potential.parameters())
    found: list[Tensor | None] = list(torch.autograd.grad(value, [*inputs, *weights], allow_unused=True))
    missed = [name for name, gradient in zip(names, found) if gradient is None]
    if weights and not any(g is not None and g.any() for g in found[len(inputs) :]):
        missed.append("the weights")
    if missed:
        case.fail(f"autograd does not reach {missed[0]} from {of}, whose graph is cut")
    return found


def _of_positions(case: Case, gradient: Tensor | None, scalar: Callable[[Atoms], float]) -> None:
    def moved(direction: np.ndarray, step: float) -> float:
        atoms = case.atoms.copy()
        atoms.positions += step * direction
        return scalar(atoms)

    assert gradient is not None
    _along_directions(case, "positions", array(gradient), moved)


def _of_weights(case: Case, gradients: Sequence[Tensor | None], scalar: Callable[[Atoms], float]) -> None:
    weights = list(case.exact.parameters())
    if not weights:
        return
    # Weights differ by orders of magnitude: each tensor is measured in units of its own.
    units = [float(w.detach().square().mean().sqrt()) or 1.0 for w in weights]
    before = [w.detach().clone() for w in weights]
    pieces = [
        np.zeros(w.shape) if g is None else unit * array(g)
        for w, g, unit in zip(weights, gradients, units, strict=True)
    ]
    splits = np.cumsum([piece.size for piece in pieces])[:-1]

    def changed(direction: np.ndarray, step: float) -> float:
        for w, value, unit, d in zip(weights, before, units, np.split(direction, splits), strict=True):
            w.data.copy_(value + step * unit * torch.from_numpy(d.reshape(w.shape)).to(value))
        found = scalar(case.atoms)
        for w, value in zip(weights, before, strict=True):
            w.data.copy_(value)
        return found

    _along_directions(case, "weights", np.concatenate([p.ravel() for p in pieces]), changed)


def _along_directions(case: Case, of: str, gradient: np.ndarray, scalar: Callable[[np.ndarray, float], float]) -> None:
    """Compare along the gradient itself, and along a random direction, which shows what it lacks."""
    length, worst = float(np.linalg.norm(gradient)), 0.0
    random = case.random.normal(size=gradient.shape)
    for direction in (gradient, random):
        size = np.linalg.norm(direction)
        if not size > 0:
            continue
        unit = direction / size
        expected = derivative(partial(scalar, unit))
        scale = max(length, abs(expected))
        if scale:
            worst = float(np.maximum(worst, np.abs((gradient * unit).sum() - expected) / scale))
    name, first = f"{case.check} {of}", "stress" if case.check == "cells" else "forces"
    case.measure(name, "gradient", worst, f"its second derivatives ({name})", f"differences of its {first}")


def _signs(case: Case, n: int, shape: tuple[int, ...]) -> np.ndarray:
    return case.random.choice([-1.0, 1.0], size=(n, *shape))
