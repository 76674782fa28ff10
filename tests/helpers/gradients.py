"""Gradients through relaxations, and finite differences of whole relaxations to compare them with."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import nn

from ase_bptt import Structures, relax
from ase_bptt.neighbors import NeighborList
from ase_bptt.potentials.analytic import Morse
from ase_bptt.potentials.emt import EMT
from ase_bptt.steppers import FIRE, GradientDescent, fire, stepper

from .potentials import Bowl, lennard_jones, stiff_mace
from .structures import alloy, cluster, copper, pentamer, skewed, trimer, vacancy


def batch(*atoms) -> Structures:
    """These structures, with positions that take part in gradients."""
    structures = Structures.from_atoms(atoms)
    structures.positions.requires_grad_()
    return structures


def gradient(inputs, loss) -> list[torch.Tensor]:
    """The gradient in each of the inputs, zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def nearby_positions(structures) -> torch.Tensor:
    """References not far from the initial positions, which stay when those are perturbed."""
    noise = np.random.default_rng(11).normal(0, 0.2, (structures.n_atoms, 3))
    return structures.positions.detach() + torch.from_numpy(noise)


def mass_weighted_distance(relaxation, reference) -> torch.Tensor:
    """To the references, summed over the structures."""
    square = relaxation.start.masses * (relaxation.positions - reference).square().sum(1)
    return relaxation.start.sum(square).sqrt().sum()


def sum_of_distances(positions, structures) -> torch.Tensor:
    """A weighted sum of the distances between atoms, which no rigid motion changes, summed over the structures."""
    total = positions.new_zeros(())
    for x in positions.split(structures.counts):
        i, j = torch.triu_indices(len(x), len(x), 1)
        lengths = (x[i] - x[j]).norm(dim=1)
        total = total + (lengths * torch.linspace(-1, 1.5, len(lengths)).to(x)).sum()
    return total


@contextmanager
def recorded_decisions():
    """Everything of a run that its gradient takes as given: neighbours, capped steps, FIRE's branches."""
    trace = []
    find, cap = NeighborList.__call__, stepper.cap
    steps = {cls: cls.step for cls in (FIRE, GradientDescent)}

    def spied_find(self, structures):
        edges = find(self, structures)
        rows = torch.column_stack((edges.i, edges.j, edges.shifts.long())).numpy()
        trace.append(("edges", structures.counts, rows[np.lexsort(rows.T)].tobytes()))
        return edges

    def spied_cap(square, maxstep):
        trace.append(("capped", tuple((square > maxstep**2).tolist())))
        return cap(square, maxstep)

    def spied_step(self, positions, forces, state, batch):
        moved, after = steps[type(self)](self, positions, forces, state, batch)
        lengths = (moved - positions).norm(dim=1)
        # Two steps that are as long by symmetry have the same derivative: rounding must not choose.
        capped = lengths > (1 - 1e-9) * self.maxstep
        trace.append(("longest", capped.nonzero().flatten().tolist()))
        if isinstance(self, FIRE):
            trace.append(("downhill", tuple(after.structures["downhill"].tolist())))
            trace.append(("dtmax", tuple((after.structures["dt"] >= self.dtmax).tolist())))
        return moved, after

    with (
        mock.patch.object(NeighborList, "__call__", spied_find),
        mock.patch.object(stepper, "cap", spied_cap),  # of each atom
        mock.patch.object(fire, "cap", spied_cap),  # of the whole step
        mock.patch.object(FIRE, "step", spied_step),
        mock.patch.object(GradientDescent, "step", spied_step),
    ):
        yield trace


def loss_and_decisions(potential, structures, reference, **arguments):
    """The distance to the reference after a relaxation, frames of each structure, decisions."""
    with recorded_decisions() as trace:
        relaxation = relax(potential, structures, **arguments)
    return mass_weighted_distance(relaxation, reference), relaxation.nsteps.tolist(), trace


def finite_difference(evaluate, usual, inputs, direction, h) -> float | None:
    """Five-point central difference; None where a perturbed run decides anything differently."""
    kept = [x.detach().clone() for x in inputs]
    losses = []
    with torch.no_grad():
        for step in (-2, -1, 1, 2):
            for x, d in zip(inputs, direction, strict=True):
                x += step * h * d
            loss, *same = evaluate()
            for x, value in zip(inputs, kept, strict=True):
                x.copy_(value)
            if same != usual:
                return None
            losses.append(loss.item())
    return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * h)


def check_gradient(evaluate, usual, inputs, analytic, *, h, directions=3, tolerance=1e-6) -> float:
    """Compare along random unit directions; the largest error found, relative to the derivative or a typical one."""
    size = sum(x.numel() for x in inputs)
    norm = torch.cat([g.flatten() for g in analytic]).norm().item()
    assert norm > 0
    rng = torch.Generator().manual_seed(3)
    worst, done = 0.0, 0
    for _ in range(directions + 5):
        direction = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in inputs]
        length = torch.cat([d.flatten() for d in direction]).norm()
        direction = [d / length for d in direction]
        expected = sum((g * d).sum().item() for g, d in zip(analytic, direction, strict=True))
        found = finite_difference(evaluate, usual, inputs, direction, h)
        if found is None:
            found = finite_difference(evaluate, usual, inputs, direction, h / 4)
        if found is None:
            continue
        worst = max(worst, abs(found - expected) / max(abs(expected), norm / size**0.5))
        done += 1
        if done == directions:
            break
    assert done == directions, "no perturbed run took the branches of the unperturbed one"
    assert worst < tolerance
    return worst


SYSTEMS = {
    "bowl": (lambda: Bowl(np.linspace(1, 9, 6)), lambda: [Bowl(np.linspace(1, 9, 6)).atoms(0.1)], 1e-2),
    "lj crystal": (lennard_jones, lambda: [vacancy()], 1e-3),
    "lj cluster": (lennard_jones, lambda: [cluster()], 1e-3),
    "lj batch": (lennard_jones, lambda: [vacancy(), pentamer(), cluster(), vacancy(seed=3)], 1e-3),
    "morse batch": (lambda: Morse(rho0=4.0), lambda: [pentamer(stretch=1.0), vacancy(a=1.38)], 1e-3),
    "emt batch": (EMT, lambda: [copper(), alloy()], 3e-3),
    "mace crystal": (stiff_mace, lambda: [skewed()], 1e-2),
    "mace batch": (stiff_mace, lambda: [trimer(), skewed()], 1e-2),
}
"""A potential, structures, and the step of a finite difference in its weights."""


def _learnable(cls, **hyperparameters):
    kept = {k: v for k, v in hyperparameters.items() if k in ("maxstep", "dtmax", "Nmin")}
    learned = {k: torch.tensor(v, dtype=torch.float64) for k, v in hyperparameters.items() if k not in kept}
    return cls(**kept, **{k: nn.Parameter(v) for k, v in learned.items()})


LEARNABLE = {
    "gd": lambda: _learnable(GradientDescent, step_size=0.002, anneal=0.97, momentum=0.3, maxstep=0.05),
    "fire": lambda: _learnable(
        FIRE, dt=0.03, a=0.15, astart=0.1, fa=0.98, finc=1.2, fdec=0.4, dtmax=0.06, Nmin=2, maxstep=0.2
    ),
}
"""Steppers with hyperparameters that are Parameters."""


def add_in_place(potential):
    with torch.no_grad():
        potential.sigma += 0.01


def load_state(potential):
    potential.load_state_dict({"sigma": torch.tensor(1.01), "epsilon": torch.tensor(1.0)})


def take_adamw_step(potential):
    optimizer = torch.optim.AdamW(potential.parameters(), lr=0.01)
    potential.epsilon.square().backward()
    optimizer.step()


def replace_weights(potential):
    potential.load_state_dict({k: v + 0.01 for k, v in potential.state_dict().items()}, assign=True)


WEIGHT_CHANGES = [add_in_place, load_state, take_adamw_step, replace_weights]
"""Ways in which the weights of a Lennard-Jones potential change."""
