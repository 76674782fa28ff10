"""The methods that benchmarks/study.py compares: each tunes a potential in place, and ends in its best epoch.

All keep their epoch as the Trainer does (the last as good as the best on the validation kinds). "default" is what
`Trainer` and `ase-bptt train` do; the other entries say in what they differ from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_bptt import RelaxationPair, Structures, Trainer
from ase_bptt.cells import CELLS
from ase_bptt.cells.strained import Strained
from ase_bptt.neighbors import NeighborList
from ase_bptt.potential import Potential
from ase_bptt.steppers import GradientDescent
from ase_bptt.terms.probes import energies_and_forces
from ase_bptt.training.distributed import together
from ase_bptt.training.state import RunRecord
from ase_bptt.training.validation import Validation, validate

Splits = dict[str, list[RelaxationPair]]
Method = Callable[[Potential, Splits, int], dict[str, Any]]
Loss = Callable[..., torch.Tensor]
FORCE_EPOCHS, FORCE_BATCH, FORCE_LEARNING_RATE = 8, 16, 1e-3
CRYSTAL_EPOCHS, FIRST_EPOCHS = 9, 12
"""Through the relaxation, and of zero force before it."""
CURVE = (3, 6, 12, 24)


def drawn(train: Sequence[RelaxationPair], share: float, seed: int) -> list[RelaxationPair]:
    """The pairs of a share of the kinds, at least of two; an integer is a number of kinds."""
    kinds = sorted({p.group for p in train})
    count = share if isinstance(share, int) else max(2, round(share * len(kinds)))
    chosen = np.random.default_rng(seed).permutation(len(kinds))[:count]
    names = {kinds[k] for k in chosen}
    return [p for p in train if p.group in names]


def trained(potential: Potential, splits: Splits, seed: int, *, share: float = 1.0, **changes: Any) -> dict[str, Any]:
    """By the Trainer, with its defaults but for these changes, on a share of the training kinds."""
    train = drawn(splits["train"], share, seed)
    epochs = {"epochs": changes.pop("epochs")} if "epochs" in changes else {}
    trainer = Trainer(potential, seed=seed, **changes)
    trainer.fit(train, splits["valid"], **epochs)
    return trainer.settings() | {"best_epoch": trainer.best_epoch, "training_pairs": len(train)}


def refitted(potential: Potential, splits: Splits, seed: int) -> dict[str, Any]:
    """As `ase-bptt train` ends: once more from the untuned weights, on the validation kinds, too, to the kept epoch."""
    untuned = {name: value.clone() for name, value in potential.state_dict().items()}
    said = trained(potential, splits, seed)
    if said["best_epoch"]:
        potential.load_state_dict(untuned)
        pairs = [*splits["train"], *splits["valid"]]
        Trainer(potential, seed=seed).fit(pairs, epochs=said["best_epoch"])
        said |= {"training_pairs": len(pairs)}
    return said


def matched(
    potential: Potential, splits: Splits, seed: int, *, at_references: bool = False, share: float = 1.0,
    loss: Loss | None = None, epochs: int = FORCE_EPOCHS, batch_size: int = FORCE_BATCH,
) -> dict[str, Any]:  # fmt: skip
    """By the forces of all frames of the training relaxations, or by zero force at their ends; no relaxation."""
    pairs = drawn(splits["train"], share, seed)
    frames = [p.relaxed for p in pairs] if at_references else [atoms for p in pairs for atoms in p.frames]
    record = RunRecord()
    keep(record, potential, splits["valid"])
    of_frames = partial(loss or force_loss, zero=at_references)
    for record.epoch in fit_frames(potential, frames, seed, loss=of_frames, epochs=epochs, batch_size=batch_size):
        if record.epoch % max(2, epochs // 6) == 0 or record.epoch == epochs:
            keep(record, potential, splits["valid"])
    potential.load_state_dict(record.best["potential"])
    return {"epochs": epochs, "lr": FORCE_LEARNING_RATE, "batch_size": batch_size,
            "best_epoch": record.best_epoch, "training_frames": len(frames)}  # fmt: skip


def fit_frames(
    potential: Potential, frames: Sequence[Atoms], seed: int, *, loss: Loss, epochs: int = FORCE_EPOCHS,
    batch_size: int = FORCE_BATCH, lr: float = FORCE_LEARNING_RATE,
) -> Iterator[int]:  # fmt: skip
    """Lower a loss of frames; the number of each epoch as it has ended."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(potential.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-len(frames) // batch_size) * epochs)
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(frames))
        for k in range(0, len(order), batch_size):
            optimizer.zero_grad()
            loss(potential, [frames[m] for m in order[k : k + batch_size]], create_graph=True).backward()
            torch.nn.utils.clip_grad_norm_(potential.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        yield epoch


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


def row_loss(
    potential: Potential, frames: Sequence[Atoms], *, zero: bool = False, create_graph: bool = True
) -> torch.Tensor:
    """Mean absolute error of the components of forces, eV/Å, and of -V stress as the force on the balanced cell rows.

    With `zero` against none at all. Crystals whose cells are free.
    """
    rows = Strained.of(potential.batch(frames), [CELLS["full"]] * len(frames), balanced=True)
    _, forces = energies_and_forces(potential, rows)
    if zero:
        return forces.abs().mean()
    wanted = []
    for atoms, factor in zip(frames, rows.factors.tolist(), strict=True):
        wanted += [atoms.get_forces(), -atoms.get_volume() * atoms.get_stress(voigt=False) / factor]
    return (forces - forces.new_tensor(np.concatenate(wanted))).abs().mean()


def squared_rows(potential: Potential, frames: Sequence[Atoms], **_: Any) -> torch.Tensor:
    """Mean square over the rows of what `row_loss` has."""
    rows = Strained.of(potential.batch(frames), [CELLS["full"]] * len(frames), balanced=True)
    _, forces = energies_and_forces(potential, rows)
    return forces.square().sum(1).mean()


def force_error(potential: Potential, frames: Sequence[Atoms]) -> float:
    """Mean absolute error over all components, eV/Å."""
    chunks = [frames[k : k + FORCE_BATCH] for k in range(0, len(frames), FORCE_BATCH)]
    weights = [sum(len(a) for a in chunk) for chunk in chunks]
    return float(np.average([force_loss(potential, chunk).item() for chunk in chunks], weights=weights))


def keep(record: RunRecord, potential: Potential, valid: Sequence[RelaxationPair]) -> Validation:
    """Keep the weights where the Trainer would, by its validation."""
    found = validate(potential, valid, together())
    record.untuned = record.untuned or found.row
    if record.keeps(found):
        record.keep(potential=potential.state_dict())
    return found


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
ON_DEFECTS: dict[str, Method] = {"refit": refitted, "rate 0.001": partial(trained, lr=1e-3)}
"""On DFT relaxations of defects, beside those: what `train` hands back, and the rate that potentials as large as CHGNet
had before validation spoke for 0.002."""
ZERO_FORCE = f"zero-force:{FIRST_EPOCHS}"
STRUCTURES = partial(trained, epochs=CRYSTAL_EPOCHS, terms=())
STAGES = partial(trained, epochs=FIRST_EPOCHS + CRYSTAL_EPOCHS, first=ZERO_FORCE, terms=())
ON_CRYSTALS: dict[str, Method] = {
    "untuned": untuned,
    "zero-force": partial(trained, epochs=FIRST_EPOCHS, first=ZERO_FORCE, terms=()),
    "structures": STRUCTURES,
    "stages": STAGES,
    "labels": partial(trained, epochs=CRYSTAL_EPOCHS),
    "frames": partial(matched, loss=row_loss, epochs=CRYSTAL_EPOCHS, batch_size=4),
    "squares": partial(matched, at_references=True, loss=squared_rows, epochs=60, batch_size=4),
    **{f"stages at {n}": partial(STAGES, share=n) for n in CURVE},
    **{f"structures at {n}": partial(STRUCTURES, share=n) for n in CURVE},
}
"""Where the cell moves; the last ones are trained on so many compounds."""
for _name in ("zero-force", "structures", "stages", "labels"):
    ON_CRYSTALS[f"{_name} 0.001"] = partial(ON_CRYSTALS[_name], lr=1e-3)
