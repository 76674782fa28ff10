"""Fine-tuning: epochs, checkpoints, the best state on validation."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adjoints import Adjoint
from ..evaluation import Evaluation, evaluate
from ..pairs import RelaxationPair, fingerprint
from ..potential import Potential
from ..potentials import as_potential, save_potential
from ..steppers import Stepper
from ..terms import Term, make_terms
from ..utils import check_positive
from . import checkpoint
from . import checkpoint as resuming
from .data import Order, Tally
from .distributed import align, together
from .metrics import Progress, validate
from .pair_loss import Loss
from .settings import check_data, make_pair_loss, make_stepper_definite
from .updates import OptimizerFactory, Updates

Pairs = Sequence[RelaxationPair]


class Trainer:
    """Fine-tune a potential so that its relaxations end where the reference's do (arXiv 2512.01067).

    Under `torchrun`, or in a process group of yours, all processes build the same Trainer and share each batch.

    Parameters
    ----------
    potential : Potential, module or spec
        As for `load_potential`; a module that is given is trained in place, its frozen weights stay.
    stepper : Stepper or str
        The map to unroll: the paper's gradient descent by default, with momentum; BFGS for `Implicit` and `OneStep`,
        which need the minimum and not the path.
    adjoint : Adjoint or str
        `Replay` by default, or another of `ase_bptt.adjoints`. With `Guided`, the loss counts at the relaxed structure
        and, by its weight, after the first frames.
    loss : callable or str
        ``loss(relaxation, reference) -> Tensor (n,)``, or a name in `ase_bptt.losses.LOSSES`.
    optimizer : callable
        ``optimizer(parameters) -> torch.optim.Optimizer``; AdamW with `lr` by default.
    lr : float
        Learning rate of the default optimizer at the start; it falls to zero by a half cosine.
    steps : int or None
        Frames of an unroll. Few (8 to 40) teach which basin to fall into; a converged run does not. None is 10, and
        300 at most for adjoints that need the minimum.
    fmax : float
        eV/Å: structures stop below this, in training.
    batch_size : int
        Pairs in one step of the optimizer.
    memory : float or None
        GiB that may be taken at once: a batch that needs more is computed in parts, and its gradient stays the same.
        None is 80 % of what is free on a GPU, and no limit elsewhere.
    clip : float
        Largest norm of the gradient.
    patience : int or None
        Stop after so many epochs without a better validation score (the mean `log_delta_q` of the validation
        structures, relaxed by FIRE); None never stops early.
    along : float
        Share of the training starts that are drawn on the way from the initial to the reference structure, anew in each
        epoch; the others are the initial structures. They teach the basin of the reference even where the relaxation
        from the initial structure never reaches it.
    rattle : float
        Standard deviation in Å of the noise on every training start.
    seed : int
        Of the order of the pairs and of their starts.
    warm : int
        With `Implicit`, `OneStep` or `Guided`: begin the relaxation to the minimum where it ended in the epoch before,
        and from the initial structure again in every epoch of this many; 0 always begins there. Warm starts are not
        varied by `along` and `rattle`, but for the first frames of `Guided`.
    learn : str or sequence of str
        Numbers of the stepper that are trained, too, such as "step_size": of a copy of the one that is given, while
        Parameters that it holds already are trained in place.
    rates : mapping of str to float, optional
        By a pattern for names of weights, the factor on `lr` for them (`ase_bptt.tuning.groups`).
    terms : sequence of Term or str
        Further terms of the loss, such as those that keep a potential from forgetting (`ase_bptt.terms`); by
        name they have weight 1.
    out : path, optional
        Run folder: settings.json, metrics.csv, checkpoint.pt, potential/ (the best so far).
    progress : bool or None
        A bar on a terminal, else a line each epoch through logging (level INFO, logger "ase_bptt"); None
        asks whether standard error is a terminal.
    """

    def __init__(
        self,
        potential: Potential | nn.Module | str,
        *,
        stepper: Stepper | str | None = None,
        adjoint: Adjoint | str | None = None,
        loss: Loss | str = "root_delta_q",
        optimizer: OptimizerFactory | None = None,
        lr: float = 2e-3,
        steps: int | None = None,
        fmax: float = 0.01,
        batch_size: int = 4,
        memory: float | None = None,
        clip: float = 1.0,
        patience: int | None = None,
        along: float = 0.5,
        rattle: float = 0.03,
        seed: int = 0,
        warm: int = 0,
        learn: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
        terms: Sequence[Term | dict[str, Any] | str] = (),
        out: str | Path | None = None,
        progress: bool | None = None,
    ):
        check_positive(
            steps=steps, batch_size=batch_size, memory=memory, lr=lr, fmax=fmax, clip=clip, patience=patience,
            warm=warm or None,
        )  # fmt: skip
        self.potential = as_potential(potential)
        self.learn = [learn] if isinstance(learn, str) else list(learn)
        self._pairs = pairs = make_pair_loss(
            self.potential, stepper, adjoint, loss, steps=steps, fmax=fmax, learn=self.learn, warm=warm, memory=memory
        )
        self.stepper, self.adjoint, self.loss, self.warm_starts = pairs.stepper, pairs.adjoint, pairs.loss, pairs.warm
        self.steps, self.fmax, self.batch_size, self.clip, self.warm = pairs.steps, fmax, batch_size, clip, warm
        self.patience, self.seed, self.lr, self.along, self.rattle = patience, seed, lr, along, rattle
        self.ranks, self.out = pairs.ranks, None if out is None else Path(out)
        self.memory = memory
        self.progress = progress if self.ranks.writes else False
        self.rates, self.terms = dict(rates or {}), make_terms(terms)
        self.updates = Updates(pairs, self.terms, optimizer, lr=lr, rates=self.rates, clip=clip)
        self.optimizer = self.updates.optimizer
        self.order = Order(batch_size, along, rattle, seed)
        self.epoch, self.epochs, self.data = 0, 0, ""
        self.begun_with = self.stepper.hyperparameters()
        self.history: list[dict[str, float]] = []
        self.best: dict[str, dict[str, Tensor]] = {}
        self.best_loss, self.best_epoch = float("inf"), 0

    def fit(self, train: Pairs, valid: Pairs = (), *, epochs: int = 16) -> Trainer:
        """Train, and leave the potential and the numbers of the stepper in their best state on the validation pairs.

        Without validation pairs the last state is kept. A resumed Trainer goes on after its last complete epoch, and
        needs the same pairs and epochs.

        Raises
        ------
        ValueError
            Before any work: for pairs whose groups stand on both sides, for other pairs than before.
        NotImplementedError
            Before any work: for constraints or elements that cannot be treated, by name.
        """
        self.begin(train, valid, epochs=epochs)
        if self.epoch == 0:
            self._keep(self._validate(valid)["valid_score"], valid)
        with Progress(epochs, len(train), done=self.epoch, bar=self.progress) as progress:
            while self.epoch < epochs and not self._out_of_patience():
                began = time.monotonic()
                row = self._train_epoch(train, progress)
                self.epoch += 1
                found = self._validate(valid)
                row |= {**found, "seconds": time.monotonic() - began}
                self.history.append(row)
                self._keep(found["valid_score"], valid)
                progress.epoch(row)
        self.potential.load_state_dict(self.best["potential"])
        self.stepper.load_state_dict(self.best["stepper"])
        return self

    def begin(self, train: Pairs, valid: Pairs = (), test: Pairs = (), *, epochs: int) -> None:
        """Check the pairs, and write a run folder that can be resumed, before the first epoch and what leads to it.

        `fit` does it by itself; whoever measures something first calls it first.
        """
        self.check(train, valid, test, epochs=epochs)
        fresh = not self.data
        self.epochs, self.data = epochs, fingerprint([*train, *valid])
        align(self)
        if self.warm_starts:
            self.warm_starts.begin(train)
        if fresh:
            self.stepper = make_stepper_definite(self._pairs, train)
            self.begun_with = self.stepper.hyperparameters()
            self.potential.metadata = resuming.provenance(self)
        self.updates.prepare(train)
        if fresh:
            self._write(potential=True)

    def _train_epoch(self, train: Pairs, progress: Progress) -> dict[str, float]:
        tally = Tally(len(train), self.terms)
        for share, batch in self.order.batches(train, self.epoch):
            self.updates.set_rate((self.epoch + share) / self.epochs)
            losses, norm = self.train_step(batch)
            tally.add(losses, norm, self.updates.further)
            progress.advance(len(batch), tally.losses)
        rate = self.optimizer.param_groups[0]["lr"]
        return tally.row(self.epoch + 1, rate, self._pairs.counts(), self.stepper)

    def train_step(self, pairs: Pairs) -> tuple[list[float], float]:
        """One step of the optimizer on a batch: the losses that counted, and the gradient's norm.

        Pairs whose relaxation diverges are reported and left out.
        """
        losses = self.backward(pairs)
        norm = self.updates.take(pairs, (self.seed, self.epoch)) if losses else None
        if norm is None:
            return [], 0.0
        self.stepper.clamp_parameters()
        return losses, norm

    def backward(self, pairs: Pairs) -> list[float]:
        """Gradients of the mean loss of a batch, into ``.grad``; the losses of the pairs that counted."""
        self.updates.clear()
        return self._pairs.backward(pairs, self.epoch)

    def evaluate(self, pairs: Pairs, **settings: Any) -> Evaluation:
        """`ase_bptt.evaluation.evaluate` with the potential as it is."""
        return evaluate(self.potential, pairs, **settings)

    def _validate(self, valid: Pairs) -> dict[str, float]:
        return validate(self.potential, valid, self.ranks, self.memory)

    def _keep(self, score: float, valid: Pairs) -> None:
        """Keep this state: as the best if it is that, or if it is the last and there is nothing to judge by."""
        best = not valid or not self.best or score < self.best_loss
        if best:
            self.best_loss, self.best_epoch = min(self.best_loss, score), self.epoch
            now = {"potential": self.potential.state_dict(), "stepper": self.stepper.state_dict()}
            self.best = copy.deepcopy(now)
        self._write(potential=best)

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.epoch - self.best_epoch >= self.patience

    def check(self, train: Pairs, valid: Pairs = (), test: Pairs = (), *, epochs: int) -> None:
        """Raise what `fit` would raise for these pairs, before any work is lost."""
        check_positive(epochs=epochs)
        if self.out is not None:
            self.potential.config()  # raises where it could not be saved
        if self.data and (fingerprint([*train, *valid]), epochs) != (self.data, self.epochs):
            raise ValueError("This run was begun with other pairs or epochs: go on with those, or start a new run.")
        check_data(self._pairs, self.terms, train, valid, test)

    def settings(self) -> dict[str, Any]:
        """What `resume` needs to build the same Trainer, as JSON."""
        return resuming.settings(self)

    def save(self, folder: str | Path) -> None:
        """Write the potential: our format, which loads without unpickling, and the family's native file."""
        if self.ranks.writes:
            save_potential(self.potential, folder)

    def _write(self, *, potential: bool) -> None:
        terms = self.updates.terms_state()
        if self.out is None or not self.ranks.writes:
            return
        if potential:
            self.save(self.out / "potential")
        checkpoint.write(self.out, self.settings(), self.history, resuming.state(self, terms))

    @classmethod
    def resume(
        cls,
        out: str | Path,
        *,
        optimizer: OptimizerFactory | None = None,
        loss: Loss | None = None,
        stepper: Stepper | None = None,
        adjoint: Adjoint | None = None,
        terms: Sequence[Term] | None = None,
        device: torch.device | str | None = None,
        progress: bool | None = None,
    ) -> Trainer:
        """Go on after the last complete epoch of a run folder; where its checkpoint is damaged, after the one before.

        An optimizer, loss, stepper, adjoint or term of your own must be given again.
        """
        settings, state, rewound = together().once(lambda: checkpoint.read(out))
        given = {"optimizer": optimizer, "loss": loss, "stepper": stepper, "adjoint": adjoint, "terms": terms}
        arguments = resuming.arguments(Path(out), settings, state, given, device)
        trainer = cls(**arguments, out=out, progress=progress)
        if rewound:
            resuming.rewind(trainer, state)
        resuming.restore(trainer, state)
        return trainer
