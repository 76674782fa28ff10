"""The checks of a potential, one function each: shapes, symmetries, forces, stress, derivatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from torch import Tensor

from .case import Case, Results, array, derivative


def second(case: Case) -> None:
    """The gradient of a function of the forces, in positions and weights, agrees with finite differences."""
    structures, edges = case.batch(case.atoms)
    if not len(edges.i):
        case.report.skipped[case.check] = "no atom of the structure has a neighbour"
        return
    positions = structures.positions.requires_grad_()
    along = torch.from_numpy(case.random.normal(size=positions.shape)).to(positions)
    with torch.enable_grad():
        _, forces = case.potential.energy_and_forces(structures, edges, create_graph=True)
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
    # Weights differ by orders of magnitude: each tensor is measured in units of its own.
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
    case.measure(name, "gradient", worst, f"its second derivatives ({name})", "differences of its forces")


def untouched(case: Case) -> None:
    """Flags, gradients and values of the weights, and the positions that are given, are left as they are."""
    potential = case.potential
    weights = dict(potential.named_parameters())
    for k, weight in enumerate(weights.values()):
        weight.requires_grad_(k % 2 == 0)
    before = {name: (w.requires_grad, w.detach().clone()) for name, w in weights.items()}
    mode = potential.training
    structures, edges = case.batch(case.atoms)
    positions = structures.positions.clone()
    potential.results(structures, edges)
    potential.energy_and_forces(structures, edges)
    if structures.positions.requires_grad or not torch.equal(positions, structures.positions):
        case.fail("it changed the positions that it was given, or what they require")
    potential.energy_and_forces(structures.replace(positions=positions.requires_grad_()), edges, create_graph=True)
    for name, weight in weights.items():
        flag, value = before[name]
        if weight.requires_grad is not flag or weight.grad is not None or not torch.equal(weight, value):
            case.fail(f"it changed requires_grad, the gradient or the value of its weight {name}")
    if potential.training is not mode:
        case.fail("it changed between training and evaluation mode")
    potential.requires_grad_()


class Check(NamedTuple):
    """A check, and what to do where it fails."""

    run: Callable[[Case], None]
    remedy: str


def shapes(case: Case) -> None:
    """Everything has the shape that it is documented with, in the dtype of the potential."""
    structures, edges = case.batch(case.atoms)
    n, potential = len(case.atoms), case.potential
    expected = {"energy": (1,), "forces": (n, 3), "stress": (1, 3, 3), "atomic_energies": (n,), "magmoms": (n,)}
    called = dict(zip(expected, potential.energy_and_forces(structures, edges), strict=False))
    for found in (potential.results(structures, edges), called):
        for name in expected.keys() & found.keys():
            quantity, value = name.replace("_", " "), found[name]
            if tuple(value.shape) != expected[name]:
                case.fail(f"the shape of its {quantity} is {tuple(value.shape)} and not {expected[name]}")
            if value.dtype is not potential.dtype:
                case.fail(f"the dtype of its {quantity} is {value.dtype} and not {potential.dtype}")


def calls(case: Case) -> None:
    """`results` and `energy_and_forces` agree."""
    structures, edges = case.batch(case.atoms)
    energy, forces = case.potential.energy_and_forces(structures, edges)
    if energy.requires_grad or forces.requires_grad:
        case.fail("energy_and_forces without create_graph gave tensors that are still attached")
    found = {"energy": energy.double().cpu().numpy(), "forces": forces.double().cpu().numpy()}
    case.compare(found, case.results(case.atoms), "what results() gives", structures.counts)


def partition(case: Case) -> None:
    """Atomic energies sum to the energy."""
    found = case.results(case.atoms)
    if "atomic_energies" not in found:
        case.report.skipped[case.check] = "it has no atomic energies"
        return
    total = {"energy": found["atomic_energies"].sum(keepdims=True)}
    case.compare(total, found, "the sum of its atomic energies", (len(case.atoms),))


def batch(case: Case) -> None:
    """A batch gives what its members give alone."""
    members = [case.atoms, case.atoms[:1], case.atoms[::-1]]
    alone = [case.results(m) for m in members]
    expected = {name: np.concatenate([found[name] for found in alone]) for name in alone[0]}
    case.compare(case.results(members), expected, "what its members give alone", [len(m) for m in members])


def translation(case: Case) -> None:
    """Nothing changes when all atoms are moved together, or one by whole cell vectors."""
    moved, atoms = case.atoms.copy(), case.atoms
    shifts = case.random.integers(-2, 3, size=(len(atoms), 3)) * atoms.pbc
    moved.positions += case.random.normal(scale=5.0, size=3) + shifts @ atoms.cell.array
    what = "what they were before all atoms were moved together, and some by whole cell vectors"
    case.compare(case.results(moved), case.results(atoms), what, (len(atoms),))


def rotation(case: Case) -> None:
    """Forces and stress turn with the structure."""
    turn, _ = np.linalg.qr(case.random.normal(size=(3, 3)))
    # No reflection: not every potential is invariant under it.
    turn *= np.linalg.det(turn)
    turned, expected = case.atoms.copy(), case.results(case.atoms)
    turned.positions = turned.positions @ turn.T
    turned.cell[:] = case.atoms.cell.array @ turn.T
    expected["forces"] = expected["forces"] @ turn.T
    if "stress" in expected:
        expected["stress"] = turn @ expected["stress"] @ turn.T
    case.compare(
        case.results(turned), expected, "what they were before the structure was turned, turned alike", (len(turned),)
    )


def permutation(case: Case) -> None:
    """The order of the atoms does not matter."""
    order = case.random.permutation(len(case.atoms))
    expected = case.results(case.atoms)
    per_atom = {"forces", "atomic_energies", "magmoms"}
    expected = {name: value[order] if name in per_atom else value for name, value in expected.items()}
    case.compare(
        case.results(case.atoms[order]), expected, "what they are in another order of the atoms", (len(order),)
    )


def far(case: Case) -> None:
    """An atom beyond the cutoff is isolated, and does not affect the others."""
    cluster = Atoms(case.atoms.numbers, case.atoms.positions)
    lone = cluster[:1]
    reach = np.ptp(cluster.positions, axis=0).max() + 2 * case.potential.cutoff
    lone.positions += [reach, 0, 0]
    here, there = case.results(cluster), case.results(lone)
    expected: Results = {"energy": here["energy"] + there["energy"]}
    expected["forces"] = np.concatenate([here["forces"], np.zeros((1, 3))])
    what = "what they are without an atom that is far past the cutoff, and of that atom alone"
    case.compare(case.results(cluster + lone), expected, what, (len(cluster) + 1,))


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
    reason = "the structure has no volume" if case.atoms.cell.rank < 3 else ""
    if not case.potential.conservative:
        reason = "its forces are predicted directly, and it has no stress"
    if reason:
        case.report.skipped[case.check] = reason
        return
    found, worst = case.results(case.atoms)["stress"][0], 0.0
    for signs in _signs(case, 3, (3, 3)):
        direction = (signs + signs.T) / 2

        def energy(step: float, direction: np.ndarray = direction) -> float:
            strained = case.atoms.copy()
            strained.set_cell(case.atoms.cell.array @ (np.eye(3) + step * direction), scale_atoms=True)
            return case.energy(strained)

        expected = derivative(energy) / case.atoms.get_volume()
        error = np.abs((found * direction).sum() - expected) / max(1.0, np.abs(found).max())
        worst = float(np.maximum(worst, error))
    what = "the derivative of its energy with respect to strain over the volume, by differences"
    case.measure(case.check, "strain", worst, "the components of its stress", what)


def parity(case: Case, calculator: Calculator) -> None:
    """What the family's own calculator gives."""
    found, atoms = case.results(case.atoms), case.atoms.copy()
    atoms.calc = calculator
    asked = {"energy": "energy", "forces": "forces", "energies": "atomic_energies", "magmoms": "magmoms"}
    expected: Results = {}
    for name, ours in asked.items():
        # Some calculators promise what they do not always compute.
        if ours in found and name in calculator.implemented_properties:
            with suppress(PropertyNotImplementedError):
                expected[ours] = np.atleast_1d(calculator.get_property(name, atoms))
    if atoms.cell.rank == 3 and "stress" in calculator.implemented_properties:
        expected["stress"] = atoms.get_stress(voigt=False)[None]
    case.compare(found, expected, f"what {type(calculator).__name__} gives", (len(atoms),))


def _signs(case: Case, n: int, shape: tuple[int, ...]) -> np.ndarray:
    return case.random.choice([-1.0, 1.0], size=(n, *shape))


CHECKS = {
    "shapes": Check(shapes, "return one number for each structure or atom, in the dtype of structures.positions"),
    "calls": Check(calls, "compute both from one function, detached where no graph is asked for"),
    "partition": Check(partition, "add everything to the atomic energies that the energy contains"),
    "forces": Check(forces, "let the energy depend on structures.positions alone, live, with smooth cutoffs"),
    "stress": Check(stress, "let the energy depend on live structures.cells, as edges.vectors(structures) does"),
    "batch": Check(batch, "sum over structures.batch, and let nothing depend on the other members"),
    "translation": Check(translation, "use positions in edges.vectors(structures) only, which has the images"),
    "rotation": Check(rotation, "take scalars from distances and angles, and vectors from edges.vectors(structures)"),
    "permutation": Check(permutation, "sum over neighbours, and read elements from structures.numbers"),
    "far atom": Check(far, "let an atom without edges have its own energy, no forces, and finite ones"),
    "gradient": Check(second, "keep the graph of the forces, without detach(), item() or numpy on the way"),
    "untouched": Check(untouched, "leave flags, weights and inputs as they are, and work on copies"),
}
"""Every check but parity, in order."""
