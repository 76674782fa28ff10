"""The methods that benchmarks/study.py compares: each tunes a potential in place, and ends in its best epoch.

All keep their epoch as the Trainer does (the last as good as the best on the validation kinds). "default" is what
`Trainer` and `ase-bptt train` do; the other entries say in what they differ from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_bptt import RelaxationPair, Structures, Trainer
from ase_bptt.neighbors import NeighborList
from ase_bptt.potential import Potential
from ase_bptt.steppers import GradientDescent
from ase_bptt.training.distributed import together
from ase_bptt.training.state import RunRecord
from ase_bptt.training.validation import validate

Splits = dict[str, list[RelaxationPair]]
Method = Callable[[Potential, Splits, int], dict[str, Any]]
FORCE_EPOCHS, FORCE_BATCH, FORCE_LEARNING_RATE = 8, 16, 1e-3


def drawn(train: Sequence[RelaxationPair], share: float, seed: int) -> list[RelaxationPair]:
    """The pairs of a share of the kinds, at least of two."""
    kinds = sorted({p.group for p in train})
    chosen = np.random.default_rng(seed).permutation(len(kinds))[: max(2, round(share * len(kinds)))]
    names = {kinds[k] for k in chosen}
    return [p for p in train if p.group in names]


def trained(potential: Potential, splits: Splits, seed: int, *, share: float = 1.0, **changes: Any) -> dict[str, Any]:
    """By the Trainer, with its defaults but for these changes, on a share of the training kinds."""
    train = drawn(splits["train"], share, seed)
    epochs = {"epochs": changes.pop("epochs")} if "epochs" in changes else {}
    trainer = Trainer(potential, seed=seed, **changes)
    trainer.fit(train, splits["valid"], **epochs)
    return trainer.settings() | {"best_epoch": trainer.best_epoch, "training_pairs": len(train)}


def matched(
    potential: Potential, splits: Splits, seed: int, *, at_references: bool = False, share: float = 1.0
) -> dict[str, Any]:
    """By the forces of all frames of the training relaxations, or by zero force at their ends; no relaxation."""
    pairs = drawn(splits["train"], share, seed)
    frames = [p.relaxed for p in pairs] if at_references else [atoms for p in pairs for atoms in p.frames]
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(potential.parameters(), lr=FORCE_LEARNING_RATE, weight_decay=0.0)
    count = -(-len(frames) // FORCE_BATCH) * FORCE_EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    record = RunRecord()
    keep(record, potential, splits["valid"])
    for epoch in range(1, FORCE_EPOCHS + 1):
        order = rng.permutation(len(frames))
        for k in range(0, len(order), FORCE_BATCH):
            optimizer.zero_grad()
            batch = [frames[m] for m in order[k : k + FORCE_BATCH]]
            force_loss(potential, batch, zero=at_references, create_graph=True).backward()
            torch.nn.utils.clip_grad_norm_(potential.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        if epoch % 2 == 0:
            record.epoch = epoch
            keep(record, potential, splits["valid"])
    potential.load_state_dict(record.best["potential"])
    return {"epochs": FORCE_EPOCHS, "lr": FORCE_LEARNING_RATE, "batch_size": FORCE_BATCH,
            "best_epoch": record.best_epoch, "training_frames": len(frames)}  # fmt: skip


def staged(potential: Potential, splits: Splits, seed: int, *, at_references: bool = False) -> dict[str, Any]:
    """Forces first, then through the relaxation, structures alone."""
    first = matched(potential, splits, seed, at_references=at_references)
    return {"first": first, "then": trained(potential, splits, seed, terms=())}


def force_loss(
    potential: Potential, frames: Sequence[Atoms], *, zero: bool = False, create_graph: bool = False
) -> torch.Tensor:
    """Mean absolute error of the force components, eV/Å; with `zero` against no force at all."""
    batch = Structures.from_atoms(frames, dtype=potential.dtype)
    wanted = np.concatenate([np.zeros((len(a), 3)) if zero else a.get_forces() for a in frames])
    edges = NeighborList(potential.cutoff, skin=0.0)(batch)
    batch.positions.requires_grad_(create_graph)
    _, forces = potential.energy_and_forces(batch, edges, create_graph=create_graph)
    return (forces - torch.as_tensor(wanted).to(forces)).abs().mean()


def force_error(potential: Potential, frames: Sequence[Atoms]) -> float:
    """Mean absolute error over all components, eV/Å."""
    chunks = [frames[k : k + FORCE_BATCH] for k in range(0, len(frames), FORCE_BATCH)]
    weights = [sum(len(a) for a in chunk) for chunk in chunks]
    return float(np.average([force_loss(potential, chunk).item() for chunk in chunks], weights=weights))


def keep(record: RunRecord, potential: Potential, valid: Sequence[RelaxationPair]) -> None:
    """Keep the weights where the Trainer would, by its validation."""
    found = validate(potential, valid, together())
    record.untuned = record.untuned or found.row
    if record.keeps(found):
        record.keep(potential=potential.state_dict())


def untuned(potential: Potential, splits: Splits, seed: int) -> dict[str, Any]:
    """Nothing at all."""
    return {}


METHODS: dict[str, Method] = {
    "untuned": untuned,
    "default": trained,
    "structures": partial(trained, terms=()),
    "forces": matched,
    "zero-force": partial(matched, at_references=True),
    "staged": staged,
    "staged-zero-force": partial(staged, at_references=True),
    "guided": partial(trained, adjoint="guided:10"),
    "implicit": partial(trained, adjoint="implicit"),
}
VARIANTS: dict[str, Method] = {
    **{f"default at {share:.0%}": partial(trained, share=share) for share in (0.05, 0.1, 0.2, 0.4, 0.7, 0.8)},
    **{f"structures at {share:.0%}": partial(trained, share=share, terms=()) for share in (0.05, 0.1, 0.2, 0.4, 0.8)},
    **{f"forces at {share:.0%}": partial(matched, share=share) for share in (0.05, 0.1, 0.2, 0.4, 0.8)},
    **{f"{frames} frames": partial(trained, steps=frames) for frames in (5, 20, 40)},
    "step size halved": partial(trained, stepper=GradientDescent(0.025, momentum=0.7)),
    "step size doubled": partial(trained, stepper=GradientDescent(0.1, momentum=0.7)),
    "no momentum": partial(trained, stepper=GradientDescent(0.05)),
    "annealed": partial(trained, stepper=GradientDescent(0.05, momentum=0.7, anneal=0.95)),
    "fire": partial(trained, stepper="fire"),
    "not rattled": partial(trained, rattle=0.0),
    "starts as given": partial(trained, rattle=0.0, interpolate=0.0),
    "loss delta_q": partial(trained, loss="delta_q"),
    "loss log_delta_q": partial(trained, loss="log_delta_q"),
    "loss squared_delta_q": partial(trained, loss="squared_delta_q"),
}
"""For the learning curves (a share of the training kinds) and the table of robustness, on the surrogate set."""
