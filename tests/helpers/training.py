"""Training runs that take milliseconds: Lennard-Jones clusters, relaxed at sigma 2.5, for a potential with another."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_bptt import RelaxationPair, Trainer, load_potential, relax
from ase_bptt.potentials.analytic import LennardJones
from ase_bptt.steppers import GradientDescent
from ase_bptt.terms.probes import Targets
from ase_bptt.training.validation import Validation

from .potentials import wide_lennard_jones
from .structures import wide_cluster

SETTINGS = {
    "loss": "delta_q", "steps": 6, "fmax": 0.01, "batch_size": 2, "lr": 0.02, "clip": 1.0, "interpolate": 0.5,
    "rattle": 0.02, "seed": 4, "progress": False, "terms": (),
}  # fmt: skip


def untuned() -> LennardJones:
    return wide_lennard_jones(sigma=2.65)


def trainer(potential=None, **changes) -> Trainer:
    return Trainer(potential or untuned(), **SETTINGS | {"stepper": GradientDescent(0.05)} | changes)


class Scripted(Trainer):
    """Validation that gives the scores that the test wants, one for each epoch or a list with one for each kind."""

    def __init__(self, *args, script, **kwargs):
        super().__init__(*args, **kwargs)
        self.script, self.sigmas = iter(script), []

    def validate(self, valid):
        self.sigmas.append(self.potential.sigma.item())
        scores = np.atleast_1d(next(self.script)).tolist()
        return Validation(scores, [f"kind {k}" for k in range(len(scores))], 7.0)


# Pairs.


def make_pairs(first: int, n: int) -> list[RelaxationPair]:
    starts = [wide_cluster(k) for k in range(first, first + n)]
    with torch.no_grad():
        ends = relax(wide_lennard_jones(), starts, fmax=1e-3, steps=500).to_atoms()
    return [
        RelaxationPair(a, b, f"pair {k}", f"group {k}")
        for k, (a, b) in enumerate(zip(starts, ends, strict=True), first)
    ]


def labelled(atoms: Atoms, potential, offset: float = 0.0) -> Atoms:
    """With energy and forces of this potential; its energies are offset by so much an atom."""
    found = Targets.of(potential, [atoms])
    atoms = atoms.copy()
    energy = found.energies.item() + offset * len(atoms)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=found.forces.numpy())
    return atoms


def pair_with_frames(k: int, potential, offset: float = 0.0) -> RelaxationPair:
    """A relaxation by this potential, with energies and forces of its frames."""
    frames = [wide_cluster(k)]
    for _ in range(4):
        with torch.no_grad():
            frames.append(relax(potential, frames[-1], fmax=1e-3, steps=6).to_atoms())
    frames = [labelled(a, potential, offset) for a in frames]
    return RelaxationPair(frames[0], frames[-1], f"pair {k}", f"group {k}", frames=frames)


class Exploding(LennardJones):
    """Not finite, or with a gradient that is not, for structures with xenon."""

    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        has_xenon = structures.sum((structures.numbers == 54).to(found.energy)) > 0
        return dataclasses.replace(found, energy=found.energy * torch.where(has_xenon, self.fault, 1.0))


def with_xenon(pair: RelaxationPair) -> RelaxationPair:
    initial, relaxed = pair.relaxed.copy(), pair.relaxed.copy()
    initial.symbols[0] = relaxed.symbols[0] = "Xe"
    return dataclasses.replace(pair, initial=initial, relaxed=relaxed, id="the bad pair")


# Runs that are killed, and what they leave.


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def killed_in(run: Trainer, step: int) -> Trainer:
    """A trainer that dies in the given step of the optimizer, counted from one."""
    real, steps = run.optimizer.step, iter(range(1, 1000))

    def dying(*args, **kwargs):
        if next(steps) == step:
            raise Killed
        return real(*args, **kwargs)

    run.optimizer.step = dying
    return run


def same(a, b) -> bool:
    """Whether two nests of tensors and plain values are one, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def without_times(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def contents(run: Trainer, folder: Path) -> dict:
    """All that a run has computed and written, but for times."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {
        "weights": dict(run.potential.state_dict()),
        "optimizer": state["optimizer"],
        "last": state["potential"],
        "best": state["best"],
        "history": without_times(state["history"]),
        "metrics": without_times(csv.DictReader((folder / "metrics.csv").read_text().splitlines())),
        "settings": json.loads((folder / "settings.json").read_text()),
        "saved": dict(load_potential(folder).state_dict()),
    }


def interrupted(make, tmp_path, train, valid=(), *, step, epochs, **given):
    """A run that nothing interrupts, and one of the same that died in a step and was resumed: they are the same."""
    whole = make(tmp_path / "whole").fit(train, valid, epochs=epochs)
    with pytest.raises(Killed):
        killed_in(make(tmp_path / "run"), step).fit(train, valid, epochs=epochs)
    torch.manual_seed(99)
    resumed = Trainer.resume(tmp_path / "run", progress=False, **given)
    assert 0 < resumed.epoch < epochs
    resumed.fit(train, valid, epochs=epochs)
    assert same(contents(resumed, tmp_path / "run"), contents(whole, tmp_path / "whole"))
    assert same(dict(resumed.stepper.state_dict()), dict(whole.stepper.state_dict()))
    assert resumed.record.initial_hyperparameters == whole.record.initial_hyperparameters
    return whole, resumed
