"""What a run remembers: how far it has come, and the state of everything that training changes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..pairs import RelaxationPair
from ..tuning import low_rank
from .distributed import Ranks
from .pair_loss import PairLoss
from .settings import PASSES
from .training_data import Order
from .updates import Updates
from .validation import Validation

KEPT_AS_IT_WAS = (
    "The potential was kept as it was: after no epoch did the validation structures end closer to their references. "
    "Give more kinds of structures, or a lower learning rate."
)
WORSE = (
    "The potential was kept as it was: the tuned one, whose figures these are, is worse on the held-out structures "
    "(geometric mean of Delta-Q). Give more kinds of structures, or a lower learning rate."
)


class NoGain(UserWarning):
    """No epoch was better on the validation pairs than the untuned potential, whose weights are therefore kept."""


def without_gain(rows: Sequence[Mapping[str, float]]) -> str:
    """That the untuned potential was the best, and how near the best epoch came, from the rows of metrics.csv."""
    scored = {int(row["epoch"]): row for row in rows if math.isfinite(row.get("valid_score", math.nan))}
    tuned = [epoch for epoch in scored if epoch]
    if 0 not in scored or not tuned:
        return KEPT_AS_IT_WAS
    best = min(tuned, key=lambda epoch: scored[epoch]["valid_score"])
    farther = math.expm1(scored[best]["valid_score"] - scored[0]["valid_score"])
    return f"{KEPT_AS_IT_WAS} With the best, epoch {best}, they end {farther:.0%} farther off (geometric mean)."


@dataclass(kw_only=True)
class RunRecord:
    """How far a run has come.

    Attributes
    ----------
    epoch, epochs : int
        Complete ones, and those of the whole run.
    fingerprint : str
        Of the pairs; empty before the run is started.
    history : list of dict
        A row of metrics.csv for each epoch.
    untuned : dict
        Validation before the first epoch, the row of epoch 0.
    initial : dict of str to Tensor
        State dict of the potential before training.
    best : dict
        State dicts of the "potential" and the "stepper" as they are kept; empty before the first validation.
    best_epoch : int
        The epoch that is kept; 0 is the state before training.
    lowest_epoch : int
        That with the lowest validation score.
    lowest_scores : list of float
        Its validation scores, pair by pair.
    initial_hyperparameters : dict of str to float
        Of the stepper before training.
    """

    epoch: int = 0
    epochs: int = 0
    fingerprint: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    untuned: dict[str, float] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best_epoch: int = 0
    lowest_epoch: int = 0
    lowest_scores: list[float] = field(default_factory=list)
    initial_hyperparameters: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The history, after the untuned potential as epoch 0, which has no training loss."""
        blank = dict.fromkeys(self.history[0], float("nan")) if self.history else {}
        return [blank | {"epoch": 0, **self.untuned}, *self.history] if self.untuned else self.history

    def check(self, fingerprint: str, epochs: int) -> None:
        """Raise ValueError for other pairs or epochs than those that the run was started with."""
        if (fingerprint, epochs) != (self.fingerprint, self.epochs):
            raise ValueError(
                "This run was started with other pairs or epochs: continue with those, or start a new run."
            )

    def keeps(self, found: Validation) -> bool:
        """Whether the present epoch is to be kept, by its validation: the last that is as good as the best.

        The learning rate falls, so that of epochs which the validation pairs cannot tell apart the last has the most
        settled weights. One that is no better than the untuned potential is never kept.
        """
        first = not self.lowest_scores
        lowest = found if first else Validation(self.lowest_scores, found.kinds, found.delta_q)
        if first or found.score < lowest.score or math.isnan(lowest.score):
            lowest, self.lowest_epoch, self.lowest_scores = found, self.epoch, list(found.scores)
        return first or (not found.score >= self.untuned["valid_score"] and found.as_good_as(lowest))

    def keep(self, **state_dicts: dict[str, Any]) -> None:
        """Keep copies of state dicts of the present epoch."""
        self.best_epoch, self.best = self.epoch, copy.deepcopy(state_dicts)

    def warn_without_gain(self) -> None:
        """Warn, in the name of the caller's caller, where the untuned potential was the best."""
        if self.best_epoch == 0:
            warnings.warn(without_gain(self.rows), NoGain, stacklevel=3)

    def out_of_patience(self, patience: int | None, first: int = 0) -> bool:
        """Whether the lowest validation score is so many epochs old, not counting those of a first stage."""
        return patience is not None and self.epoch - max(self.lowest_epoch, first) >= patience


@dataclass(kw_only=True)
class TrainerState(RunRecord):
    """All that the next epoch depends on, beside the settings: what checkpoint.pt holds.

    Attributes
    ----------
    potential, stepper, optimizer, schedule : dict
        State dicts; `schedule` is that of the learning rates.
    steps_taken : int
        Steps of the optimizer.
    generator : Tensor
        State of the random generator that draws the order of the pairs.
    form : str
        As `Potential.form`.
    lora : dict or None
        Settings of low-rank updates.
    frozen : list of str
        Names of the potential's parameters that require no gradients.
    terms : list of dict
        State of each further term of the loss.
    warm_ends : dict of str to Tensor
        As `WarmStarts.ends`.
    torch_rng : Tensor
        State of torch's own random generator.
    """

    potential: dict[str, Any]
    stepper: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    steps_taken: int
    generator: Tensor
    form: str
    lora: dict[str, Any] | None
    frozen: list[str]
    terms: list[dict[str, Any]]
    warm_ends: dict[str, Tensor]
    torch_rng: Tensor

    @classmethod
    def names(cls) -> list[str]:
        """The keys of `to_dict`."""
        return [field.name for field in fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which load without unpickling."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TrainerState:
        """The state that `to_dict` gave; KeyError where something is missing."""
        return cls(**{name: state[name] for name in cls.names()})

    @property
    def record(self) -> RunRecord:
        """The part that is not the state of an object."""
        return RunRecord(**{field.name: getattr(self, field.name) for field in fields(RunRecord)})


@dataclass(frozen=True)
class Parts:
    """The objects of a Trainer that training changes, whose settings and state belong into its run folder.

    Attributes
    ----------
    pair_loss : PairLoss
        With the potential, the stepper and the warm starts.
    updates : Updates
        With the optimizer and the terms.
    order : Order
    numbers : dict
        The keywords of the Trainer that are plain numbers and names.
    """

    pair_loss: PairLoss
    updates: Updates
    order: Order
    numbers: dict[str, Any]

    def settings(self, record: RunRecord) -> dict[str, Any]:
        """What the same Trainer can be built from, as JSON."""
        loss = self.pair_loss.loss
        return {
            "family": self.pair_loss.potential.family,
            "stepper": self.pair_loss.stepper.todict(),
            "adjoint": self.pair_loss.adjoint.todict(),
            "loss": getattr(loss, "__name__", type(loss).__name__),
            "optimizer": type(self.updates.optimizer).__name__,
            "terms": [term.todict() for term in self.updates.terms],
            **self.numbers,
            "epochs": record.epochs,
        }

    def prepare(self, train: Sequence[RelaxationPair], epochs: int) -> None:
        """Set up what depends on the pairs and is not part of a checkpoint."""
        if self.pair_loss.warm:
            self.pair_loss.warm.remember(train)
        first, n = min(self.pair_loss.first, epochs), self.order.n_batches(len(train))
        stages = [(PASSES * n, first), (n, epochs - first)]
        self.updates.prepare(train, [(steps, epochs) for steps, epochs in stages if epochs])

    def state(self, record: RunRecord) -> TrainerState:
        """Their state with the record; all ranks must ask for it."""
        potential, warm = self.pair_loss.potential, self.pair_loss.warm
        return TrainerState(
            **vars(record),
            **self._shared_state(),
            form=potential.form,
            lora=low_rank.settings(potential),
            frozen=[name for name, p in potential.named_parameters() if not p.requires_grad],
            terms=self.updates.terms_state(),
            warm_ends=warm.ends if warm else {},
            torch_rng=torch.get_rng_state(),
        )

    def load(self, state: TrainerState) -> None:
        """Continue from what `state` gave."""
        self._load_shared_state(state.to_dict())
        torch.set_rng_state(state.torch_rng)
        if self.pair_loss.warm:
            self.pair_loss.warm.ends = state.warm_ends
        for term, kept in zip(self.updates.terms, state.terms, strict=True):
            term.load(kept)

    def share(self, ranks: Ranks, record: RunRecord) -> None:
        """Take over the state of rank 0; ValueError where a rank has other settings, pairs or epochs."""
        if ranks.size > 1:
            ranks.require_equal(lambda: (self.settings(record), record.fingerprint, record.epoch))
            self._load_shared_state(ranks.shared_state(self._shared_state))

    def load_best(self, record: RunRecord) -> None:
        """Bring potential and stepper into the best state of a run."""
        self.pair_loss.potential.load_state_dict(record.best["potential"])
        self.pair_loss.stepper.load_state_dict(record.best["stepper"])

    def start_stage(self, record: RunRecord) -> None:
        """Begin a second stage, without momenta, from what validation prefers: what the first one left, or not."""
        self.load_best(record)
        self.updates.start_stage()

    def _shared_state(self) -> dict[str, Any]:
        """What must be the same on all ranks, whether given or rebuilt."""
        return {
            "potential": self.pair_loss.potential.state_dict(),
            "stepper": self.pair_loss.stepper.state_dict(),
            "generator": self.order.generator.get_state(),
            **self.updates.state(),
        }

    def _load_shared_state(self, state: Mapping[str, Any]) -> None:
        self.pair_loss.potential.load_state_dict(state["potential"])
        self.pair_loss.stepper.load_state_dict(state["stepper"])
        self.order.generator.set_state(state["generator"])
        self.updates.load(state)
