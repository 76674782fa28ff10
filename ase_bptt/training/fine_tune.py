"""From a potential and pairs to a run folder: train, and measure before and after."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from ..drift import Snapshot, take_snapshot
from ..drift.changes import DriftReport
from ..evaluation import Evaluation, Row, evaluate
from ..evaluation.compare import compare
from ..pairs import RelaxationPair, fingerprint
from ..pairs.groups import split_into_folds
from ..utils import counted, without_nan
from . import Trainer
from .checkpoint import provenance
from .distributed import together
from .results import BEFORE, MEASURED, RESULTS, SNAPSHOTS, RunResults, merge_folds, read_rows, summary, write_rows
from .training_data import TrainingData

log = logging.getLogger(__name__)
Splits = Mapping[str, Sequence[RelaxationPair]]


def finetune(
    trainer: Trainer,
    splits: Splits | TrainingData,
    out: Path,
    *,
    epochs: int,
    facts: dict[str, str] | None = None,
    make: Callable[[Path], Trainer] | None = None,
    resume: Callable[[Path], Trainer] = Trainer.resume,
) -> RunResults:
    """Train on "train", choose the epoch on "valid", measure on "test"; write the run folder.

    The untuned potential is measured first, and the results are kept in before.json, for a run that is stopped and
    resumed. Where the tuned one is worse on "test", potential/ holds the untuned one, and the results say so.
    Otherwise, with `make`, potential/ is trained once more, on all pairs: more kinds of structures help most, and
    nothing is left to be chosen. The one that was measured is then in measured/.

    Parameters
    ----------
    trainer : Trainer
        New or resumed, with ``out`` as its run folder.
    splits : dict of "train", "valid" and "test" to pairs, or TrainingData
        The latter are pairs that this Trainer has checked.
    out : Path
    epochs : int
    facts : dict of str to str
        Further lines for the head of the page.
    make, resume : callable
        As for `cross_validate`; without `make`, the potential that was measured is handed back.

    Examples
    --------
    >>> import tempfile
    >>> from ase.build import bulk
    >>> from ase_bptt import RelaxationPair, Trainer
    >>> splits = {}
    >>> for name, element in (("train", "Al"), ("valid", "Cu"), ("test", "Ag")):
    ...     initial = bulk(element, cubic=True)
    ...     initial.rattle(0.1, seed=1)
    ...     splits[name] = [RelaxationPair(initial, bulk(element, cubic=True), element, element)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer = Trainer("emt", steps=5, out=folder, progress=False)
    ...     results = finetune(trainer, splits, Path(folder), epochs=1)
    ...     (Path(folder) / "report.html").is_file()
    True
    """
    clock = time.monotonic()
    data = splits if isinstance(splits, TrainingData) else trainer.check(**splits)
    results = _trained_and_measured(trainer, data, out, epochs, facts or {})
    _describe(trainer, {name: len(part) for name, part in data.splits().items()}, results)
    again = None if results.kept_as_it_was else make
    trainer.save(out / (MEASURED if again else "potential"))
    # A resumed run adds up what its epochs took, since nobody knows how long it was stopped.
    took = sum(row["seconds"] for row in trainer.history)
    if again:
        took += _train_on_all_pairs(results, again, resume, [p for part in data.splits().values() for p in part])
    results.seconds = max(time.monotonic() - clock, took)
    if trainer.ranks.writes:
        results.write()
    return results


def _trained_and_measured(
    trainer: Trainer, data: TrainingData, out: Path, epochs: int, facts: dict[str, str]
) -> RunResults:
    """Leaves the potential that is better on "test"."""
    given = trainer.stepper.todict()
    trainer.start(data, epochs=epochs)
    first = _snapshot_before(trainer, data.test, out / SNAPSHOTS[0])
    before, before_bfgs = _before(trainer, data.test, out / BEFORE)
    trainer.run(data)
    after, after_bfgs = _measure(trainer, data.test)
    last = take_snapshot(trainer.potential, data.test)
    rejected = compare(before, after).harmful
    if rejected:
        trainer.potential.load_state_dict(trainer.record.initial)
    return RunResults(
        out,
        before,
        after,
        before_bfgs,
        after_bfgs,
        trainer.record.rows,
        best_epoch=trainer.best_epoch,
        rejected=rejected,
        facts=facts | _step_size(trainer, given) | _learnt(trainer),
        drift_report=DriftReport(first, last, (before, after)),
        pairs=data.test,
    )


def cross_validate(
    make: Callable[[Path], Trainer],
    pairs: Sequence[RelaxationPair],
    out: Path,
    *,
    folds: int | Sequence[TrainingData],
    epochs: int,
    seed: int = 0,
    facts: dict[str, str] | None = None,
    resume: Callable[[Path], Trainer] = Trainer.resume,
) -> RunResults:
    """Fine-tune once for each fold of the groups, and measure every pair where it was held out; then train on all.

    The potential in `out` is trained on all pairs, for as many epochs as the folds kept on average. It has seen them
    all, so the figures are those of the folds. Where these are worse than the untuned potential, it is the untuned one.

    Parameters
    ----------
    make : callable
        ``make(folder)`` gives a new Trainer with the untuned potential and that run folder.
    pairs : sequence of RelaxationPair
    out : Path
        A run folder for each fold is made in it. Finished folds in it are read, and one that was stopped is resumed.
    folds : int or sequence of TrainingData
        How many; or the folds of these pairs themselves, checked by a Trainer such as `make` gives.
    epochs : int
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
    parts: list[Splits | TrainingData] = []
    parts += split_into_folds(pairs, folds, seed=seed) if isinstance(folds, int) else folds
    results = []
    for k, part in enumerate(parts):
        held_out = part.test if isinstance(part, TrainingData) else part["test"]
        log.info("fold_%d, of %s: %d held out", k, counted(len(parts), "fold"), len(held_out))
        results.append(_fold(make, resume, part, out / f"fold_{k}", epochs, facts))
    seconds = max(time.monotonic() - clock, sum(r.seconds for r in results))
    merged = merge_folds(results, pairs, out, seconds=seconds, facts=facts or {})
    _train_on_all_pairs(merged, make, resume, pairs)
    if together().writes:
        merged.write()
    return merged


def _train_on_all_pairs(
    measured: RunResults,
    make: Callable[[Path], Trainer],
    resume: Callable[[Path], Trainer],
    pairs: Sequence[RelaxationPair],
) -> float:
    """Write the potential that is handed back, trained for as many epochs as were kept; the seconds of its epochs."""
    folder = measured.out / "all_pairs"
    trainer = resume(folder) if together().once((folder / "checkpoint.pt").is_file) else make(folder)
    if measured.best_epoch and not measured.rejected:
        log.info("training on all %d pairs, for %s", len(pairs), counted(measured.best_epoch, "epoch"))
        trainer.fit(pairs, epochs=measured.best_epoch)
        measured.on_all_pairs = len(pairs)
    else:
        # The model card of the untuned potential tells of the training, too.
        data = trainer.check(pairs).fingerprint
        trainer.potential.metadata = provenance(trainer.potential, data, trainer.settings())
    _describe(trainer, {"train": len(pairs)}, measured)
    trainer.save(measured.out / "potential")
    return sum(row["seconds"] for row in trainer.history)


def _fold(
    make: Callable[[Path], Trainer],
    resume: Callable[[Path], Trainer],
    splits: Splits | TrainingData,
    folder: Path,
    epochs: int,
    facts: dict[str, str] | None,
) -> RunResults:
    held_out = splits.held_out if isinstance(splits, TrainingData) else fingerprint(splits["test"])
    data = {"held-out data": held_out[:16]}
    ranks = together()
    found = ranks.once(lambda: RunResults.load(folder) if (folder / RESULTS).is_file() else None)
    if found:
        if found.facts.get("held-out data") != data["held-out data"]:
            raise ValueError(f"{folder} holds a fold of other pairs: give those again, or --overwrite.")
        return found
    stopped = ranks.once((folder / "checkpoint.pt").is_file)
    trainer = resume(folder) if stopped else make(folder)
    return finetune(trainer, splits, folder, epochs=epochs, facts={**(facts or {}), **data})


def _step_size(trainer: Trainer, given: dict[str, Any]) -> dict[str, str]:
    """The one that was found where it was given as "auto"."""
    if given.get("step_size") != "auto":
        return {}
    found = trainer.record.initial_hyperparameters["step_size"]
    return {"step size": f"{found:.4g} Å^2/eV, half of what is stable"}


def _learnt(trainer: Trainer) -> dict[str, str]:
    """How far the hyperparameters of the stepper moved, where some were trained."""
    trained = {name.partition(".")[0] for name, p in trainer.stepper.named_parameters() if p.requires_grad}
    now = trainer.stepper.hyperparameters()
    moved = [f"{name} {initial:.4g} -> {now[name]:.4g}"
             for name, initial in trainer.record.initial_hyperparameters.items()
             if name.partition("[")[0] in trained]  # fmt: skip
    return {"learnt": ", ".join(moved)} if moved else {}


def _describe(trainer: Trainer, pairs: dict[str, int], results: RunResults) -> None:
    """Add to the potential's metadata how many pairs there were, and the figures on those held out."""
    figures = summary(results.before, results.after) | {
        f"{name}_{when}": None if of is None else getattr(of, name)
        for name in ("cell_strain", "lattice_errors", "scaled_rmsd")
        for when, of in (("before", results.before), ("after", results.after))
    }
    figures |= {
        "kept_as_it_was": results.kept_as_it_was, "folds": results.folds, "on_all_pairs": results.on_all_pairs,
    }  # fmt: skip
    trainer.potential.metadata = {**trainer.potential.metadata, "pairs": pairs, "held_out": without_nan(figures)}


def _snapshot_before(trainer: Trainer, test: Sequence[RelaxationPair], file: Path) -> Snapshot:
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
    # A run that an earlier release started, or `Trainer.fit` alone, has no such file.
    if trainer.epoch > 0:
        raise ValueError(f"There is no {file} to compare with: only a run that ase-bptt started can be resumed so.")


def _measure(trainer: Trainer, test: Sequence[RelaxationPair]) -> tuple[Evaluation, ...]:
    """By FIRE and by BFGS, each rank its share."""
    log.info("measuring on %d held-out relaxations, by FIRE and by BFGS", len(test))
    return tuple(_evaluated(trainer, test, stepper) for stepper in ("fire", "bfgs"))


def _evaluated(trainer: Trainer, test: Sequence[RelaxationPair], stepper: str) -> Evaluation:
    def run(mine: list[RelaxationPair]) -> list[tuple[Row, Atoms]]:
        found = evaluate(
            trainer.potential, mine, stepper=stepper, memory=trainer.relaxation.memory, progress=trainer.progress
        )
        return list(zip(found.rows, found.ends, strict=True))

    found = trainer.ranks.dealt(test, [p.n_atoms for p in test], run)
    return Evaluation(tuple(row for row, _ in found), tuple(end for _, end in found))
