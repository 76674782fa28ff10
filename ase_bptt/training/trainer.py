"""Fine-tuning: epochs, checkpoints, the best state on validation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adjoints import Adjoint, Replay, make_adjoint
from ..checks import check_apart, check_usable
from ..evaluation import Evaluation, evaluate
from ..guard.terms import Term, add_gradients, make_term
from ..loading import as_potential, save_potential
from ..losses import named_loss
from ..pairs import RelaxationPair, fingerprint
from ..positive import check_positive
from ..potential import Potential
from ..stability import steady
from ..steppers import BFGS, GradientDescent, Stepper, make_stepper
from ..tuning.trainable import groups
from . import checkpoint, resuming
from .pairloss import Loss, PairLoss
from .progress import Progress
from .starts import varied_starts
from .validation import validate
from .warm import WarmStarts

log = logging.getLogger(__name__)

MOMENTUM = 0.7
"""Of the default gradient descent: 10 frames go nearly as far as 30 without."""
SAMPLED = 8
"""Training structures by whose stiffness step_size="auto" is set."""
UNROLLED = 10
"""Frames of an unroll where nothing else is said."""
TO_THE_END = 300
"""Frames at most on the way to a minimum where nothing else is said."""
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class Trainer:
    """Fine-tune a potential so that its relaxations end where the reference's do (arXiv 2512.01067).

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
    clip : float
        Largest norm of the gradient.
    patience : int or None
        Stop after so many epochs without a better validation score (the mean `log_delta_q` of the validation
        structures, relaxed by FIRE); None never stops early.
    along : float
        Share of the training starts that are drawn on the way from the initial to the reference
        structure, anew in each epoch; the others are the initial structures. They teach the basin
        of the reference even where the relaxation from the initial structure never reaches it.
    rattle : float
        Standard deviation in Å of the noise on every training start.
    seed : int
        Of the order of the pairs and of their starts.
    warm : int
        With `Implicit`, `OneStep` or `Guided`: begin the relaxation to the minimum where it ended in the epoch before,
        and from the initial structure again in every epoch of this many; 0 always begins there. Warm starts are not
        varied by `along` and `rattle`, but for the first frames of `Guided`.
    learn : str or sequence of str
        Numbers of the stepper that are trained, too, such as "step_size".
    rates : mapping of str to float, optional
        By a pattern for names of weights, the factor on `lr` for them (`ase_bptt.tuning.trainable.groups`).
    terms : sequence of Term
        Further terms of the loss, such as those that keep a potential from forgetting (`ase_bptt.guard.terms`).
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
        clip: float = 1.0,
        patience: int | None = None,
        along: float = 0.5,
        rattle: float = 0.03,
        seed: int = 0,
        warm: int = 0,
        learn: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
        terms: Sequence[Term | dict[str, Any]] = (),
        out: str | Path | None = None,
        progress: bool | None = None,
    ):
        check_positive(
            steps=steps, batch_size=batch_size, lr=lr, fmax=fmax, clip=clip, patience=patience, warm=warm or None
        )
        self.potential = as_potential(potential)
        self.adjoint = make_adjoint(adjoint) or Replay()
        self.stepper = _default_stepper(self.adjoint) if stepper is None else make_stepper(stepper)
        self.adjoint.check_stepper(self.stepper)
        self.loss: Loss = named_loss(loss) if isinstance(loss, str) else loss
        self.steps = steps or (TO_THE_END if self.adjoint.to_the_end else UNROLLED)
        self.fmax, self.batch_size, self.clip = fmax, batch_size, clip
        self.warm, self.learn = warm, [learn] if isinstance(learn, str) else list(learn)
        if self.learn:
            _check_learnable(self.stepper, self.adjoint, self.learn)
            self.stepper.learn(*self.learn)
        if warm and not self.adjoint.to_the_end:
            raise ValueError(
                f"Warm starts need an adjoint that ends at the minimum, not {self.adjoint.name!r}: take 'implicit', "
                "'guided' or 'one-step'."
            )
        self._pairs = PairLoss(
            self.potential, self.stepper, self.adjoint, self.loss, self.steps, fmax, WarmStarts(warm) if warm else None
        )
        self.patience, self.seed, self.lr = patience, seed, lr
        self.along, self.rattle = along, rattle
        self.out = None if out is None else Path(out)
        self.progress = progress
        self.rates, self.terms = dict(rates or {}), [make_term(t) if isinstance(t, dict) else t for t in terms]
        if len({term.name for term in self.terms}) < len(self.terms):
            raise ValueError("Two terms of the loss have one name: give each once.")
        self._trained = [p for m in (self.potential, self.stepper) for p in m.parameters() if p.requires_grad]
        if not self._trained:
            raise ValueError("Nothing can be trained: no weight of the potential or stepper requires gradients.")
        self.optimizer = self._optimizer(optimizer)
        self.epoch = 0
        self.begun_with = self.stepper.numbers()
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss = float("inf")
        self.best_epoch = 0
        self._epochs = 0
        self._steps = 0
        self._prepared = False
        self._further: dict[str, float] = {}
        self._data = ""
        self._generator = torch.Generator().manual_seed(seed)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]

    def _optimizer(self, factory: OptimizerFactory | None) -> torch.optim.Optimizer:
        made = groups(self.potential, self.stepper, self.rates, lr=self.lr)
        if factory is None:
            return torch.optim.AdamW(made, lr=self.lr, weight_decay=0.0)
        # A factory of a person's own may expect plain parameters.
        return factory(self._trained if len(made) == 1 and not self.rates else made)

    # Training ---------------------------------------------------------------------------------

    def fit(
        self, train: Sequence[RelaxationPair], valid: Sequence[RelaxationPair] = (), *, epochs: int = 16
    ) -> Trainer:
        """Train, and leave the potential in its best state on the validation pairs.

        Without validation pairs the last state is kept. A resumed Trainer goes on after its last
        complete epoch, and needs the same pairs and epochs.

        Raises
        ------
        ValueError
            Before any work: for pairs whose groups stand on both sides, for other pairs than before.
        NotImplementedError
            Before any work: for constraints or elements that cannot be treated, by name.
        """
        self.begin(train, valid, epochs=epochs)
        if self.epoch == 0:
            self._consider(self._validate(valid)["valid_score"], valid)
            self._save_checkpoint()
        with Progress(epochs, len(train), done=self.epoch, bar=self.progress) as progress:
            while self.epoch < epochs and not self._out_of_patience():
                began = time.monotonic()
                row = self._train_epoch(train, progress)
                self.epoch += 1
                found = self._validate(valid)
                row |= {"epoch": self.epoch, **found, "seconds": time.monotonic() - began}
                self.history.append(row)
                self._consider(found["valid_score"], valid)
                self._save_checkpoint()
                progress.epoch(row)
        if self.best:
            self.potential.load_state_dict(self.best)
        return self

    def begin(
        self,
        train: Sequence[RelaxationPair],
        valid: Sequence[RelaxationPair] = (),
        test: Sequence[RelaxationPair] = (),
        *,
        epochs: int,
    ) -> None:
        """Check the pairs, and write a run folder that can be resumed, before the first epoch and what leads to it.

        `fit` does it by itself; whoever measures something first calls it first.
        """
        self.check(train, valid, test, epochs=epochs)
        fresh = not self._data
        self._epochs, self._data = epochs, fingerprint([*train, *valid])
        if self._pairs.warm:
            self._pairs.warm.begin(train)
        if fresh:
            some = [p.relaxed for p in train[:: max(1, len(train) // SAMPLED)]]
            self.stepper = self._pairs.stepper = steady(self.stepper, self.potential, some)
            self.begun_with = self.stepper.numbers()
            self.potential.metadata = resuming.provenance(self)
        if not self._prepared:
            for term in self.terms:
                term.prepare(self.potential, train)
            self._prepared = True
        if fresh and self.out is not None:
            save_potential(self.potential, self.out / "potential")
            self._save_checkpoint()

    def _train_epoch(self, train: Sequence[RelaxationPair], progress: Progress) -> dict[str, float]:
        order = torch.randperm(len(train), generator=self._generator).tolist()
        train = varied_starts(train, self.along, self.rattle, np.random.default_rng([self.seed, self.epoch]))
        batches = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        losses: list[float] = []
        norms: list[float] = []
        further: dict[str, list[float]] = {term.name: [] for term in self.terms}
        for number, batch in enumerate(batches):
            self._set_rate((self.epoch + number / len(batches)) / self._epochs)
            counted, norm = self.train_step([train[k] for k in batch])
            losses += counted
            norms.append(norm)
            for name, value in self._further.items():
                further[name].append(value)
            progress.advance(len(batch), losses)
        means = {f"term_{name}": sum(found) / len(found) if found else nan for name, found in further.items()}
        return {
            "epoch": 0,
            "train_loss": sum(losses) / len(losses) if losses else nan,
            "gradient_norm": sum(norms) / len(norms),
            "skipped": len(train) - len(losses),
            "lr": self.optimizer.param_groups[0]["lr"],
            **self._pairs.counts(),
            **means,
            **(self.stepper.numbers() if any(p.requires_grad for p in self.stepper.parameters()) else {}),
        }

    def train_step(self, pairs: Sequence[RelaxationPair]) -> tuple[list[float], float]:
        """One step of the optimizer on a batch: the losses that counted, and the gradient's norm.

        Pairs whose relaxation diverges are reported and left out.
        """
        self._further = {}
        losses = self.backward(pairs)
        if not losses:
            return [], 0.0
        self._steps += 1
        key = (self.seed, self.epoch, self._steps)
        self._further = add_gradients(self.terms, self.potential, pairs, key)
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip)
        if not torch.isfinite(norm):
            log.warning("%s: left out, for their gradient is not finite.", ", ".join(p.id for p in pairs))
            self.optimizer.zero_grad(set_to_none=True)
            return [], 0.0
        self.optimizer.step()
        self.stepper.restrain()
        return losses, norm.item()

    def backward(self, pairs: Sequence[RelaxationPair]) -> list[float]:
        """Gradients of the mean loss of a batch, into ``.grad``; the losses of the pairs that counted."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._pairs.backward(pairs, self.epoch)

    def _set_rate(self, done: float) -> None:
        """Half a cosine from the optimizer's own rates to zero."""
        factor = float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    # Validation -------------------------------------------------------------------------------

    def evaluate(self, pairs: Sequence[RelaxationPair], **settings: Any) -> Evaluation:
        """`ase_bptt.evaluation.evaluate` with the potential as it is."""
        return evaluate(self.potential, pairs, **settings)

    def _validate(self, valid: Sequence[RelaxationPair]) -> dict[str, float]:
        return validate(self.potential, valid)

    def _consider(self, found: float, valid: Sequence[RelaxationPair]) -> None:
        """Keep this state if it is the best yet, or the last and there is nothing to judge by."""
        if not valid or not self.best or found < self.best_loss:
            self.best_loss, self.best_epoch = min(self.best_loss, found), self.epoch
            self.best = {k: v.detach().clone() for k, v in self.potential.state_dict().items()}
            if self.out is not None:
                save_potential(self.potential, self.out / "potential")

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.epoch - self.best_epoch >= self.patience

    # Checks -----------------------------------------------------------------------------------

    def check(
        self,
        train: Sequence[RelaxationPair],
        valid: Sequence[RelaxationPair] = (),
        test: Sequence[RelaxationPair] = (),
        *,
        epochs: int,
    ) -> None:
        """Raise what `fit` would raise for these pairs, before any work is lost."""
        check_positive(epochs=epochs)
        if not train:
            raise ValueError("There are no pairs to train on.")
        if self.out is not None:
            self.potential.config()  # raises where it could not be saved
        check_apart(training=train, validation=valid, test=test)
        if self._pairs.warm:
            self._pairs.warm.check(train)
        if self._data and (fingerprint([*train, *valid]), epochs) != (self._data, self._epochs):
            raise ValueError("This run was begun with other pairs or epochs: go on with those, or start a new run.")
        for pair in (*train, *valid, *test):
            check_usable(self.potential, pair)

    # Files ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What `resume` needs to build the same Trainer, as JSON."""
        return resuming.settings(self)

    def save(self, folder: str | Path) -> None:
        """Write the potential: our format, which loads without unpickling, and the family's native file."""
        save_potential(self.potential, folder)

    def _save_checkpoint(self) -> None:
        if self.out is not None:
            checkpoint.write(self.out, self.settings(), self.history, resuming.state(self))

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
        """Go on after the last complete epoch of a run folder.

        An optimizer, loss, stepper, adjoint or term of your own must be given again.
        """
        settings, state = checkpoint.read(out)
        given = {"optimizer": optimizer, "loss": loss, "stepper": stepper, "adjoint": adjoint, "terms": terms}
        arguments = resuming.arguments(Path(out), settings, state, given, device)
        trainer = cls(**arguments, out=out, progress=progress)
        resuming.restore(trainer, state)
        return trainer


def _default_stepper(adjoint: Adjoint) -> Stepper:
    """The paper's map where the gradient goes through its frames, else what finds a minimum soonest."""
    return GradientDescent(momentum=MOMENTUM) if adjoint.through_frames else BFGS()


def _check_learnable(stepper: Stepper, adjoint: Adjoint, names: Sequence[str]) -> None:
    """Raise for numbers of the stepper that would stay where they are, or are no numbers yet."""
    if not adjoint.through_frames:
        raise ValueError(
            f"The adjoint {adjoint.name!r} has no gradient for the numbers of the stepper, so that none can be learnt: "
            "take 'replay' or 'guided'."
        )
    if "step_size" in names and stepper.todict().get("step_size") == "auto":
        raise ValueError(
            "step_size='auto' is found when the training begins and then kept: give it a number in Å^2/eV to learn it."
        )
