"""Fine-tuning: the Trainer, from pairs of structures to the best state on validation.

`settings` are its keywords, `training_data` its pairs, `pair_loss` the gradient of a batch, `updates` the optimizer's
steps, `validation` judges an epoch, `state` remembers, `checkpoint` is the run folder; `fine_tune` measures around it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adjoints import Adjoint
from ..evaluation import Evaluation, evaluate
from ..pairs import RelaxationPair
from ..potential import Potential
from ..potentials import as_potential, save_potential
from ..steppers import Stepper
from ..terms import Term, make_terms
from ..utils import check_positive
from . import checkpoint
from .cost import Estimate, estimate
from .distributed import together
from .metrics import EpochMetrics, Progress
from .pair_loss import PairLoss
from .settings import EPOCHS, NUMBERS, PASSES, Loss, OptimizerSettings, RelaxationSettings, SamplingSettings
from .state import Parts, RunRecord
from .training_data import Order, TrainingData, check_data
from .updates import OptimizerFactory, Updates
from .validation import Validation, validate

Pairs = Sequence[RelaxationPair]


class Trainer:
    """Fine-tune a potential so that its relaxations end where the reference's do (arXiv 2512.01067).

    Under `torchrun`, all processes build the same Trainer and share each batch.

    Parameters
    ----------
    potential : Potential, module or spec
        As for `load_potential`; a module is trained in place, and its frozen weights stay.
    stepper : Stepper or str
        The map to unroll: the paper's gradient descent, with momentum, or for `Implicit` and `OneStep` BFGS.
    adjoint : Adjoint or str
        `Replay` by default, or another of `ase_bptt.adjoints`, such as `Guided` with its two losses.
    loss : callable or str
        ``loss(relaxation, reference) -> Tensor (n,)``, or a name in `ase_bptt.losses.LOSSES`.
    optimizer, lr : callable, float or None
        ``optimizer(parameters) -> torch.optim.Optimizer``, by default AdamW with this learning rate at the start (None:
        2e-3 for potentials of up to 500,000 weights, 1e-3 for larger ones), which falls by a half cosine.
    steps, fmax : int or None, float
        Frames of an unroll: few (8 to 40) teach which basin to fall into. None is 10, or 300 at most for a minimum.
        Structures stop below fmax (eV/Å).
    batch_size : int
        Pairs in one step of the optimizer.
    memory : float or None
        GiB that may be used at once (None: 80 % of what is free on a GPU); a larger batch is computed in parts.
    clip : float
        Largest norm of the gradient.
    patience : int or None
        Epochs without a better validation score (mean `log_delta_q` after FIRE) until it stops; None never does.
    interpolate : float
        Share of the training starts that are drawn, in each epoch, on the straight line from the initial structure to
        the reference: they teach its basin even where no relaxation reaches it.
    rattle : float
        Å, standard deviation of the noise on every training start.
    seed : int
        Of the order of the pairs, of their starts and of what the terms draw.
    warm_start_every : int
        With `Implicit`, `OneStep` or `Guided`: relax to the minimum from where it ended in the epoch before, but from
        the initial structure in every N-th epoch (0: in all). Warm starts are not augmented.
    first : str or None
        "zero-force:N": the first N epochs (or 8) relax nothing: in five passes each they lower `terms.ZeroForce`. The
        best state by validation, the untuned one included, is then trained through the relaxation.
    learn : str or sequence of str
        Hyperparameters that are trained, too, such as "step_size", in a copy of the stepper; its Parameters in place.
    rates : mapping of str to float, optional
        Factors on `lr` by patterns of the weights' names (`ase_bptt.tuning.groups`).
    terms : sequence of Term or str, or None
        Further terms of the loss (`ase_bptt.terms`); with weight 1 where only a name is given. None is the energies
        and forces of the pairs' frames, where they hold any; () is the structures alone.
    out : path, optional
        Run folder: settings.json, metrics.csv, checkpoint.pt, potential/ (the best so far).
    progress : bool or None
        A bar on standard error (None: if it is a terminal), or else a line in the log (INFO) for each epoch.

    Examples
    --------
    >>> from ase_bptt import datasets
    >>> trainer = Trainer("direct", steps=3, progress=False)
    >>> trainer.fit(datasets.si_defects("train")[:4], epochs=2).best_epoch  # without validation pairs, the last
    2
    """

    def __init__(
        self, potential: Potential | torch.nn.Module | str, *,
        stepper: Stepper | str | None = None, adjoint: Adjoint | str | None = None, loss: Loss | str = "root_delta_q",
        optimizer: OptimizerFactory | None = None, lr: float | None = None, steps: int | None = None,
        fmax: float = 0.01, batch_size: int = 4, memory: float | None = None, clip: float = 1.0,
        patience: int | None = None, interpolate: float = 0.5, rattle: float = 0.03, seed: int = 0,
        warm_start_every: int = 0, first: str | None = None, learn: Sequence[str] = (),
        rates: Mapping[str, float] | None = None, terms: Sequence[Term | dict[str, Any] | str] | None = None,
        out: str | Path | None = None, progress: bool | None = None,
    ):  # fmt: skip
        self.relaxation = RelaxationSettings.resolve(
            stepper, adjoint, loss, steps=steps, fmax=fmax, warm_start_every=warm_start_every, learn=learn,
            memory=memory, first=first,
        )  # fmt: skip
        self.potential = as_potential(potential)
        self.optimization = OptimizerSettings.resolve(self.potential, lr, rates or {}, clip, patience)
        self.sampling = SamplingSettings(batch_size, interpolate, rattle, seed)
        self.terms, self.order = make_terms(terms), Order(self.sampling)
        self.ranks, self.out = together(), None if out is None else Path(out)
        self.progress = progress if self.ranks.writes else False
        self.pair_loss = PairLoss.from_settings(self.potential, self.relaxation, self.ranks)
        self.updates = Updates(self.potential, self.stepper, self.terms, self.ranks, self.optimization, optimizer)
        self.adjoint, self.optimizer = self.relaxation.adjoint, self.updates.optimizer
        numbers = vars(self.optimization) | vars(self.relaxation) | vars(self.sampling)
        self.parts = Parts(self.pair_loss, self.updates, self.order, {name: numbers[name] for name in NUMBERS})
        self.record = RunRecord(initial_hyperparameters=self.stepper.hyperparameters())

    @property
    def stepper(self) -> Stepper:
        """With the step size "auto" resolved once the run has started."""
        return self.pair_loss.stepper

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return self.record.epoch

    @property
    def history(self) -> list[dict[str, float]]:
        """A row for each complete epoch."""
        return self.record.history

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights `fit` leaves: the last as good as the best; 0 is the untuned potential."""
        return self.record.best_epoch

    def fit(self, train: Pairs, valid: Pairs = (), *, epochs: int | None = None) -> Trainer:
        """Train, and leave potential and stepper as after the last epoch that is as good as the best.

        `Validation.as_good_as` tells; without validation pairs it is the last. Where no epoch is better than the
        untuned potential, that is kept, with a `NoGain` warning. A resumed Trainer needs the same pairs and epochs,
        which are 6 by default, after those of a first stage.

        Raises
        ------
        ValueError
            Before any work: for a group in both sets of pairs, for other pairs or epochs than before.
        NotImplementedError
            Before any work: for constraints or elements that cannot be treated, by name.
        """
        epochs = EPOCHS + self.pair_loss.first if epochs is None else epochs
        self.start(data := self.check(train, valid), epochs=epochs)
        self.run(data)
        if valid:
            self.record.warn_without_gain()
        return self

    def check(self, train: Pairs, valid: Pairs = (), test: Pairs = ()) -> TrainingData:
        """The pairs, once everything about them is checked that can be checked before any work; raises as `fit`."""
        if self.out is not None:
            self.potential.config()  # raises where it could not be saved
        warm, name = self.pair_loss.warm is not None, getattr(self.relaxation.loss, "__name__", "")
        return check_data(self.potential, self.terms, train, valid, test, unique_ids=warm, loss=name)

    def start(self, data: TrainingData, *, epochs: int) -> None:
        """Start or resume the run on these pairs: from here on its folder can be resumed, though no epoch has run."""
        check_positive(epochs=epochs)
        if self.record.fingerprint:
            self.record.check(data.fingerprint, epochs)
            self.parts.share(self.ranks, self.record)
            self.parts.prepare(data.train, epochs)
        else:
            self._start_new(data, epochs)

    def _start_new(self, data: TrainingData, epochs: int) -> None:
        self.record.fingerprint, self.record.epochs = data.fingerprint, epochs
        self.parts.share(self.ranks, self.record)
        self.record.initial = copy.deepcopy(self.potential.state_dict())
        self.pair_loss.resolve_step_size(data.train)
        self.record.initial_hyperparameters = self.stepper.hyperparameters()
        self.potential.metadata = checkpoint.provenance(self.potential, data.fingerprint, self.settings())
        self.parts.prepare(data.train, epochs)
        self._write(potential=True)

    def run(self, data: TrainingData) -> Trainer:
        """Train the epochs that are left of a run that was started on these pairs; ends in the best state."""
        record, first = self.record, self.pair_loss.first
        if record.epoch == 0:
            found = self.validate(data.valid)
            record.untuned = found.row if data.valid else {}
            self._keep(found)
        with Progress(record.epochs, len(data.train), done=record.epoch, bar=self.progress) as progress:
            if record.epoch == 0:
                progress.untuned(record.untuned)
            while record.epoch < record.epochs and not record.out_of_patience(self.optimization.patience, first):
                clock = time.monotonic()
                if record.epoch == first > 0:
                    self.parts.start_stage(record)
                row = self._train_epoch(data.train, progress)
                record.epoch += 1
                found = self.validate(data.valid)
                record.history.append(row | found.row | {"seconds": time.monotonic() - clock})
                self._keep(found)
                progress.epoch(record.history[-1])
        self.parts.load_best(record)
        if data.valid and record.best_epoch == 0:
            self.potential.metadata = {**self.potential.metadata, "kept_as_it_was": True}
            if self.out is not None:
                self.save(self.out / "potential")
        return self

    def _train_epoch(self, train: Pairs, progress: Progress) -> dict[str, float]:
        passes = PASSES if self.epoch < self.pair_loss.first else 1
        metrics = EpochMetrics(passes * len(train), self.terms)
        for batch in self.order.batches(train, self.epoch, passes):
            lr = self.updates.lr
            losses, norm = self.train_step(batch)
            metrics.add(losses, norm, self.updates.term_values)
            self.updates.decay()
            progress.advance(len(batch) / passes, metrics.losses)
        return metrics.row(self.epoch + 1, lr, self.pair_loss.counts(), self.stepper)

    def train_step(self, pairs: Pairs) -> tuple[list[float], float]:
        """One step of the optimizer on a batch: the losses of pairs that did not diverge, and the gradient's norm."""
        losses = self.backward(pairs)
        norm = self.updates.step(pairs, (self.sampling.seed, self.epoch)) if losses else None
        if norm is None:
            return [], 0.0
        self.stepper.clamp_parameters()
        return losses, norm

    def backward(self, pairs: Pairs) -> list[float]:
        """Gradients of the mean loss of a batch, into ``.grad``; the losses of the pairs that counted."""
        self.updates.clear()
        return self.pair_loss.backward(pairs, self.epoch)

    def evaluate(self, pairs: Pairs, **settings: Any) -> Evaluation:
        """`ase_bptt.evaluation.evaluate` with the potential as it is."""
        return evaluate(self.potential, pairs, **settings)

    def validate(self, pairs: Pairs) -> Validation:
        """What epochs are compared by, with the potential as it is."""
        return validate(self.potential, pairs, self.ranks, self.relaxation.memory)

    def estimate(self, data: TrainingData, *, epochs: int) -> Estimate:
        """Time and memory of so many epochs, from a few small measurements; nothing is changed or written."""
        return estimate(self.pair_loss, data, self.terms, batch_size=self.sampling.batch_size, epochs=epochs)

    def _keep(self, found: Validation) -> None:
        """Write a checkpoint, and keep the state if its validation says so, or without validation as the last."""
        if kept := self.record.keeps(found):
            self.record.keep(potential=self.potential.state_dict(), stepper=self.stepper.state_dict())
        self._write(potential=kept)

    def settings(self) -> dict[str, Any]:
        """What `resume` needs to build the same Trainer, as JSON."""
        return self.parts.settings(self.record)

    def save(self, folder: str | Path) -> None:
        """Write the potential: our format, which loads without unpickling, and the family's native file."""
        if self.ranks.writes:
            save_potential(self.potential, folder)

    def _write(self, *, potential: bool) -> None:
        state = self.parts.state(self.record)
        if self.out is not None and self.ranks.writes:
            checkpoint.write(self.out, self.settings(), state, self.potential if potential else None)

    @classmethod
    def resume(
        cls, out: str | Path, *, optimizer: OptimizerFactory | None = None, loss: Loss | None = None,
        stepper: Stepper | None = None, adjoint: Adjoint | None = None, terms: Sequence[Term] | None = None,
        device: torch.device | str | None = None, progress: bool | None = None,
    ) -> Trainer:  # fmt: skip
        """The Trainer of a run folder, after its last complete epoch or, if that checkpoint is damaged, the one before.

        An optimizer, loss, stepper, adjoint or term of your own must be given again.
        """
        settings, state, rewound = together().once(lambda: checkpoint.read(out))
        given = {"optimizer": optimizer, "loss": loss, "stepper": stepper, "adjoint": adjoint, "terms": terms}
        keywords = checkpoint.rebuild(Path(out), settings, state, given, device)
        trainer = cls(**keywords, out=out, progress=progress)
        if rewound:
            checkpoint.rewind(Path(out), trainer.potential, state, trainer.ranks)
        trainer.parts.load(state)
        trainer.record = state.record
        return trainer
