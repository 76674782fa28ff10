"""The steps of the optimizer, from gradients that several processes and parts of a batch have added up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..pairs import RelaxationPair
from ..terms import Term, add_gradients
from ..tuning import groups
from ..utils import Gradients, added
from .distributed import Ranks

if TYPE_CHECKING:
    from .pair_loss import PairLoss

log = logging.getLogger(__name__)
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class Updates:
    """Moves what requires gradients in a potential and its stepper, one step of the optimizer at a time.

    Parameters
    ----------
    pairs : PairLoss
        Whose potential and stepper are trained, by the ranks that share it.
    terms : sequence of Term
        Their gradients are added in each step.
    factory : callable or None
        Makes the optimizer; None is AdamW.
    lr, rates, clip
        As for `Trainer`.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
    further : dict of str to float
        Each term in the last step, times its weight; empty where no step was taken.

    Raises
    ------
    ValueError
        Where nothing requires gradients.
    """

    def __init__(
        self,
        pairs: PairLoss,
        terms: Sequence[Term],
        factory: OptimizerFactory | None,
        *,
        lr: float,
        rates: Mapping[str, float],
        clip: float,
    ):
        self.potential, self.ranks, self.terms, self.clip = pairs.potential, pairs.ranks, terms, clip
        self._trained = pairs.trained()
        if not self._trained:
            raise ValueError("Nothing can be trained: no weight of the potential or stepper requires gradients.")
        made = groups(pairs.potential, pairs.stepper, rates, lr=lr)
        if factory is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(made, lr=lr, weight_decay=0.0)
        else:
            # A factory of a person's own may expect plain parameters.
            self.optimizer = factory(self._trained if len(made) == 1 and not rates else made)
        self.further: dict[str, float] = {}
        self._taken, self._prepared = 0, False
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]

    def prepare(self, pairs: Sequence[RelaxationPair]) -> None:
        """Have the terms look at the potential that the training begins with, once."""
        for term in () if self._prepared else self.terms:
            term.prepare(self.potential, pairs)
        self._prepared = True

    def set_rate(self, done: float) -> None:
        """Half a cosine from the optimizer's own rates to zero, by the share of the training that is done."""
        factor = float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.further = {}

    def take(self, pairs: Sequence[RelaxationPair], key: Sequence[int]) -> float | None:
        """A step by the gradients in ``.grad`` and those of the terms; the norm before it was clipped.

        None where the gradient is not finite: that is reported, and no step is taken. What the terms draw depends on
        `key` and the number of the step.
        """
        self._taken += 1
        if self.terms:
            self.further = self._add_terms(pairs, (*key, self._taken))
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
            "steps_taken": self._taken,
            "base_rates": self._base_rates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._taken, self._base_rates = state["steps_taken"], state["base_rates"]


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
