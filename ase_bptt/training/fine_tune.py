"""From a potential and pairs to a run folder: train, and measure before and after."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from ..drift import Snapshot, take_snapshot
from ..drift.changes import DriftReport
from ..evaluation import Evaluation, Row, evaluate
from ..pairs import RelaxationPair, fingerprint
from ..pairs.groups import split_into_folds
from .distributed import together
from .results import BEFORE, PORTRAITS, RESULTS, Outcome, as_one, read_rows, write_rows
from .trainer import Trainer

log = logging.getLogger(__name__)


def finetune(
    trainer: Trainer,
    splits: dict[str, list[RelaxationPair]],
    out: Path,
    *,
    epochs: int,
    facts: dict[str, str] | None = None,
) -> Outcome:
    """Train on "train", choose on "valid", measure on "test"; write the run folder.

    Parameters
    ----------
    trainer : Trainer
        New or resumed, with ``out`` as its run folder.
    splits : dict of "train", "valid" and "test" to pairs
    out : Path
    epochs : int
    facts : dict of str to str
        What else the page shall say of the run.

    What the untuned potential gives is measured first and kept in before.json, for a run that is
    stopped and resumed.
    """
    clock = time.monotonic()
    train, valid, test = (splits[name] for name in ("train", "valid", "test"))
    given = trainer.stepper.todict()
    trainer.begin(train, valid, test, epochs=epochs)
    first = _portrait_before(trainer, test, out / PORTRAITS[0])
    before, before_bfgs = _before(trainer, test, out / BEFORE)
    trainer.fit(train, valid, epochs=epochs)
    trainer.save(out / "potential")
    after, after_bfgs = _measure(trainer, test)
    last = take_snapshot(trainer.potential, test)
    # A resumed run adds up what its epochs took, since nobody knows how long it stood still.
    seconds = max(time.monotonic() - clock, sum(row["seconds"] for row in trainer.history))
    outcome = Outcome(
        out,
        before,
        after,
        before_bfgs,
        after_bfgs,
        trainer.history,
        seconds,
        best_epoch=trainer.best_epoch,
        facts=dict(facts or {}) | _step_size(trainer, given) | _learnt(trainer),
        card=DriftReport(first, last, (before, after)),
    )
    if trainer.ranks.writes:
        outcome.write()
    return outcome


def cross_validate(
    make: Callable[[Path], Trainer],
    pairs: Sequence[RelaxationPair],
    out: Path,
    *,
    folds: int,
    epochs: int,
    seed: int = 0,
    facts: dict[str, str] | None = None,
    resume: Callable[[Path], Trainer] = Trainer.resume,
) -> Outcome:
    """Fine-tune once for each fold of the groups, and measure every pair where it was held out.

    Parameters
    ----------
    make : callable
        ``make(folder)`` gives a new Trainer with the untuned potential and that run folder.
    pairs : sequence of RelaxationPair
    out : Path
        A run folder for each fold is made in it. Folds that are there and finished are read, one that
        was stopped goes on.
    folds, epochs : int
    seed : int
        Of the folds.
    facts : dict of str to str
        As for `finetune`.
    resume : callable
        ``resume(folder)`` gives the Trainer of a fold that was stopped.

    Raises
    ------
    ValueError
        For fewer groups than folds, or folders of other pairs or epochs.
    """
    clock = time.monotonic()
    splits = split_into_folds(pairs, folds, seed=seed)
    outcomes = []
    for k, split in enumerate(splits):
        folder = out / f"fold_{k}"
        log.info("fold %d of %d: %d held out", k + 1, folds, len(split["test"]))
        outcomes.append(_fold(make, resume, split, folder, epochs, facts))
    seconds = max(time.monotonic() - clock, sum(o.seconds for o in outcomes))
    merged = as_one(outcomes, pairs, out, seconds=seconds, facts=facts or {})
    if together().writes:
        merged.write()
    return merged


def _fold(
    make: Callable[[Path], Trainer],
    resume: Callable[[Path], Trainer],
    split: dict[str, list[RelaxationPair]],
    folder: Path,
    epochs: int,
    facts: dict[str, str] | None,
) -> Outcome:
    data = {"held-out data": fingerprint(split["test"])[:16]}
    ranks = together()
    found = ranks.once(lambda: Outcome.load(folder) if (folder / RESULTS).is_file() else None)
    if found:
        if found.facts.get("held-out data") != data["held-out data"]:
            raise ValueError(f"{folder} holds a fold of other pairs: give those again, or --overwrite.")
        return found
    begun = ranks.once((folder / "checkpoint.pt").is_file)
    trainer = resume(folder) if begun else make(folder)
    return finetune(trainer, split, folder, epochs=epochs, facts={**(facts or {}), **data})


def _step_size(trainer: Trainer, given: dict[str, Any]) -> dict[str, str]:
    """The one that "auto" was."""
    if given.get("step_size") != "auto":
        return {}
    return {"step size": f"{trainer.begun_with['step_size']:.4g} Å^2/eV, half of what is stable"}


def _learnt(trainer: Trainer) -> dict[str, str]:
    """How far the numbers of the stepper moved, where some were trained."""
    trained = {name.partition(".")[0] for name, p in trainer.stepper.named_parameters() if p.requires_grad}
    now = trainer.stepper.hyperparameters()
    moved = [f"{name} {begun:.4g} -> {now[name]:.4g}" for name, begun in trainer.begun_with.items()
             if name.partition("[")[0] in trained]  # fmt: skip
    return {"learnt": ", ".join(moved)} if moved else {}


def _portrait_before(trainer: Trainer, test: Sequence[RelaxationPair], file: Path) -> Snapshot:
    kept = trainer.ranks.once(lambda: Snapshot.read(file) if file.is_file() else None)
    if kept:
        return kept
    _check_untuned(trainer, file)
    found = take_snapshot(trainer.potential, test)
    if trainer.ranks.writes:
        found.write(file)
    return found


def _before(trainer: Trainer, test: Sequence[RelaxationPair], file: Path) -> tuple[Evaluation, ...]:
    kept = trainer.ranks.once(lambda: read_rows(file) if file.is_file() else None)
    if kept:
        return kept
    _check_untuned(trainer, file)
    found = _measure(trainer, test)
    if trainer.ranks.writes:
        write_rows(file, *found)
    return found


def _check_untuned(trainer: Trainer, file: Path) -> None:
    # What an earlier release began, or `Trainer.fit` alone, has no such file.
    if trainer.epoch > 0:
        raise ValueError(f"There is no {file} to compare with: only a run that ase-bptt began can be resumed so.")


def _measure(trainer: Trainer, test: Sequence[RelaxationPair]) -> tuple[Evaluation, ...]:
    """By FIRE and by BFGS, each rank its share."""
    log.info("measuring on %d held-out relaxations, by FIRE and by BFGS", len(test))
    return tuple(_evaluated(trainer, test, stepper) for stepper in ("fire", "bfgs"))


def _evaluated(trainer: Trainer, test: Sequence[RelaxationPair], stepper: str) -> Evaluation:
    def run(mine: list[RelaxationPair]) -> list[tuple[Row, Atoms]]:
        found = evaluate(trainer.potential, mine, stepper=stepper, memory=trainer.memory, progress=trainer.progress)
        return list(zip(found.rows, found.ends, strict=True))

    found = trainer.ranks.dealt(test, [p.n_atoms for p in test], run)
    return Evaluation(tuple(row for row, _ in found), tuple(end for _, end in found))
