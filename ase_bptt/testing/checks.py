"""The checks of a potential, one function each: shapes, symmetries, what is beyond the cutoff; and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError

from ..charges import SPECIFIED, charge_and_spin
from ..potential import Potential
from . import derivatives
from .case import STEP, Case, Results


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


def charge(case: Case) -> None:
    """The energy depends on the charge and the spin of each structure if `inputs` names them, and not otherwise."""
    atoms, inputs = case.atoms, case.potential.inputs
    unknown = inputs - SPECIFIED.keys()
    if unknown:
        case.fail(f"its `inputs` name {min(unknown)!r}, and there are {' and '.join(SPECIFIED)} only")
    members, here = [atoms], case.results(atoms)
    rounding = 1e-8 if case.potential.dtype is torch.float64 else 1e-5
    for name, value in zip(SPECIFIED, charge_and_spin(atoms), strict=True):
        changed = atoms.copy()
        changed.info[name] = value + 1
        found = case.results(changed)
        # NaN, the stress where there is no volume, is equal here; rounding may differ from call to call.
        same = all(np.allclose(found[k], here[k], rtol=rounding, atol=rounding, equal_nan=True) for k in here)
        if name in inputs and same:
            case.fail(f"its `inputs` name {name!r}, and nothing changes when info[{name!r}] does")
        if name not in inputs and not same:
            case.fail(f"its `inputs` do not name {name!r}, and its results change when info[{name!r}] does")
        members.append(changed)
    alone = [case.results(m) for m in members]
    expected = {name: np.concatenate([found[name] for found in alone]) for name in alone[0]}
    what = "what each member of a batch with several charges and spins gives alone"
    case.compare(case.results(members), expected, what, [len(m) for m in members])


def cutoff(case: Case) -> None:
    """The energy is continuous where an atom crosses the cutoff."""
    cluster, worst = case.atoms.copy(), 0.0
    cluster.set_cell(None)
    cluster.pbc = False
    inside = (m for m in case.potential.modules() if isinstance(m, Potential))
    for radius in {case.potential.cutoff, *(float(m.cutoff) for m in inside)}:
        for element in set(cluster.symbols):
            direction = case.random.normal(size=3)
            direction /= np.linalg.norm(direction)
            # From the outermost atom on, all others are farther away.
            outermost = cluster.positions[np.argmax(cluster.positions @ direction)]

            def jump(
                step: float,
                element: str = element,
                to: np.ndarray = direction,
                at: np.ndarray = outermost,
                r: float = radius,
            ) -> float:
                inner, outer = (cluster + Atoms(element, [at + (r + s * step) * to]) for s in (-1, 1))
                return case.energy(outer) - case.energy(inner)

            # What is continuous changes in proportion to the step, though it may bend there.
            worst = float(np.maximum(worst, abs(2 * jump(STEP) - jump(2 * STEP))))
    case.measure(case.check, "cutoff", worst, "its energy with an atom just beyond the cutoff", "that just within it")


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


CHECKS = {
    "graph": Check(
        derivatives.graph, "compute in torch from structures and edges, without detach(), item(), numpy or no_grad()"
    ),
    "shapes": Check(shapes, "return one number for each structure or atom, in the dtype of structures.positions"),
    "calls": Check(calls, "compute both from one function, detached where no graph is asked for"),
    "partition": Check(partition, "add everything to the atomic energies that the energy contains"),
    "forces": Check(
        derivatives.forces, "let the energy depend on structures.positions alone, live, with smooth cutoffs"
    ),
    "stress": Check(
        derivatives.stress, "let the energy depend on live structures.cells, as edges.vectors(structures) does"
    ),
    "batch": Check(batch, "sum over structures.batch, and let nothing depend on the other members"),
    "translation": Check(translation, "use positions in edges.vectors(structures) only, which has the images"),
    "rotation": Check(rotation, "take scalars from distances and angles, and vectors from edges.vectors(structures)"),
    "permutation": Check(permutation, "sum over neighbours, and read elements from structures.numbers"),
    "far atom": Check(far, "let an atom without edges have its own energy, no forces, and finite ones"),
    "gradient": Check(derivatives.second, "keep the graph of the forces, without detach(), item() or numpy on the way"),
    "cells": Check(
        derivatives.cells, "let the energy depend on live structures.cells, and keep the graph of its derivative"
    ),
    "charge": Check(
        charge, "name in `inputs` what forward reads of structures.charges and .spins, one for each structure"
    ),
    "cutoff": Check(cutoff, "multiply what an edge adds by a function that falls to zero at the cutoff"),
    "untouched": Check(untouched, "leave flags, weights and inputs as they are, and work on copies"),
}
"""Every check but parity, in order."""
