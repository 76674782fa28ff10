"""Steps of the optimizer, from gradients summed over the processes and the parts of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..pairs import RelaxationPair
from ..potential import Potential
from ..steppers import Stepper
from ..terms import Term, add_gradients
from ..threads import quiet
from ..tuning import groups
from ..utils import Gradients, added
from .distributed import Ranks
from .settings import OptimizerSettings

log = logging.getLogger(__name__)
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


def trained_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """All parameters that require gradients."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


class HalfCosine:
    """Factor on the learning rates: half a cosine, from 1 before the first step to 0 after the last, in each stage.

    Attributes
    ----------
    stages : sequence of (steps_per_epoch, epochs)
        Known once the training has its pairs.
    """

    def __init__(self) -> None:
        self.stages: Sequence[tuple[int, int]] = ((1, 1),)

    def __call__(self, step: int) -> float:
        for steps_per_epoch, epochs in self.stages[:-1]:
            if step < steps_per_epoch * epochs:
                break
            step -= steps_per_epoch * epochs
        else:
            steps_per_epoch, epochs = self.stages[-1]
        epoch, within = divmod(step, steps_per_epoch)
        done = (epoch + within / steps_per_epoch) / epochs
        return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))


class Updates:
    """Moves what requires gradients in a potential and its stepper, one step of the optimizer at a time.

    Parameters
    ----------
    potential : Potential
    stepper : Stepper
    terms : sequence of Term
        Their gradients are added in each step.
    ranks : Ranks
        The processes that share the work.
    settings : OptimizerSettings
    factory : callable, optional
        Makes the optimizer; AdamW by default.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
    term_values : dict of str to float
        Each term in the last step, times its weight; empty where no step was taken.

    Raises
    ------
    ValueError
        Where nothing requires gradients.
    """

    def __init__(
        self,
        potential: Potential,
        stepper: Stepper,
        terms: Sequence[Term],
        ranks: Ranks,
        settings: OptimizerSettings,
        factory: OptimizerFactory | None = None,
    ):
        self.potential, self.terms, self.ranks, self.clip = potential, terms, ranks, settings.clip
        self._trained = trained_parameters(potential, stepper)
        if not self._trained:
            raise ValueError("Nothing can be trained: no weight of the potential or stepper requires gradients.")
        by_rate = groups(potential, stepper, settings.rates, lr=settings.lr)
        if factory is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(by_rate, lr=settings.lr, weight_decay=0.0)
        else:
            # A factory of the user's own may expect plain parameters.
            self.optimizer = factory(self._trained if len(by_rate) == 1 and not settings.rates else by_rate)
        self._decay = HalfCosine()
        self._schedule = LambdaLR(self.optimizer, self._decay)
        self.term_values: dict[str, float] = {}
        self._taken, self._prepared = 0, False

    def prepare(self, pairs: Sequence[RelaxationPair], stages: Sequence[tuple[int, int]]) -> None:
        """Let the terms remember the potential as it is before the first epoch, once, and fix the ends of the decay.

        Each stage is its steps in an epoch, and its epochs.
        """
        for term in () if self._prepared else self.terms:
            term.prepare(self.potential, pairs)
        self._prepared = True
        self._decay.stages = stages

    @property
    def lr(self) -> float:
        """Learning rate of the next step, of the first group of parameters."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def decay(self) -> None:
        """Lower the learning rates to those of the next step."""
        # A first step that was left out, for its pairs diverged, counts too: torch would warn of it.
        with quiet():
            self._schedule.step()

    def start_stage(self) -> None:
        """Forget the momenta of the stage before."""
        self.optimizer.state.clear()

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.term_values = {}

    def step(self, pairs: Sequence[RelaxationPair], key: Sequence[int]) -> float | None:
        """A step by the gradients in ``.grad`` and those of the terms; the norm before it was clipped.

        None where the gradient is not finite: that is reported, and no step is taken. What the terms draw depends on
        `key` and the number of the step.
        """
        self._taken += 1
        if self.terms:
            self.term_values = self._add_terms(pairs, (*key, self._taken))
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip)
        if not torch.isfinite(norm):
            log.warning("%s: left out, for their gradient is not finite.", ", ".join(p.id for p in pairs))
            self.optimizer.zero_grad(set_to_none=True)
            return None
        self.optimizer.step()
        return norm.item()

    @property
    def _costs(self) -> list[float]:
        """By which the terms are dealt out to the ranks: none is known to take longer than another."""
        return [1.0] * len(self.terms)

    def _add_terms(self, pairs: Sequence[RelaxationPair], key: Sequence[int]) -> dict[str, float]:
        """Each term on one of the ranks; the sum of their gradients goes into ``.grad``."""
        kept, total = [p.grad for p in self._trained], Total(self._trained)
        self.optimizer.zero_grad(set_to_none=True)

        def run(terms: list[Term]) -> list[dict[str, float]]:
            return [add_gradients([term], self.potential, pairs, key) for term in terms]

        found = self.ranks.dealt(self.terms, self._costs, run)
        total.add([p.grad for p in self._trained])
        total.add_over(self.ranks)
        for parameter, gradient in zip(self._trained, kept, strict=True):
            parameter.grad = gradient
        total.put()
        return {name: value for one in found for name, value in one.items()}

    def terms_state(self) -> list[dict[str, Any]]:
        """The state of each term as it is on the rank that computes it; all ranks must ask for it."""
        on = {k: rank for rank, members in enumerate(self.ranks.shares(self._costs)) for k in members}
        return [self.ranks.once(term.state, on[k]) for k, term in enumerate(self.terms)]

    def state(self) -> dict[str, Any]:
        """What the next step depends on, beside the terms."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "steps_taken": self._taken,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._taken = state["steps_taken"]


class Total:
    """The sum of gradients with respect to some parameters; None for those on which nothing depends.

    Parameters
    ----------
    parameters : sequence of Parameter
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Gradients) -> None:
        """Add gradients, one for each parameter."""
        self.gradients = added(self.gradients, gradients)

    def add_over(self, ranks: Ranks) -> None:
        """Make it the sum over all ranks, on all of them."""
        if ranks.size == 1 or not self.parameters:
            return
        used = self.parameters[0].new_tensor([g is not None for g in self.gradients])
        filled = [torch.zeros_like(p) if g is None else g.clone()
                  for p, g in zip(self.parameters, self.gradients, strict=True)]  # fmt: skip
        ranks.sum_([*filled, used])
        # Optimizers move a parameter whose gradient is zero, but not one that has none.
        self.gradients = [g if times else None for g, times in zip(filled, used.tolist(), strict=True)]

    def put(self, divisor: float = 1.0) -> None:
        """Add it, divided, to ``.grad``."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                share = gradient / divisor
                parameter.grad = share if parameter.grad is None else parameter.grad + share
