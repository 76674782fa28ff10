"""Terms that are added to the loss: weight anchor (L2-SP), distillation, labels of frames, zero force at references.

>>> from ase_bptt import Trainer
>>> trainer = Trainer("emt", terms=[WeightAnchor(0.5), Distillation(1.0), Labels(1.0, energies=False)])
>>> [term.name for term in trainer.terms]
['weight_anchor', 'teacher', 'reference']
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ..pairs import RelaxationPair
from ..potential import Potential
from ..suggestions import named
from .labels import Labels
from .regularizers import Distillation, WeightAnchor
from .zero_force import ZeroForce

log = logging.getLogger(__name__)


class Term(Protocol):
    """A term that is added to the loss of each step, times its weight.

    Attributes
    ----------
    weight : float
    name : str
        As in `TERMS`; names its column in metrics.csv.

    Examples
    --------
    >>> import torch
    >>> class Small:
    ...     name, weight = "small", 0.1
    ...     def prepare(self, potential, pairs):
    ...         pass
    ...     def loss(self, potential, pairs, rng):
    ...         return torch.stack([p.square().mean() for p in potential.parameters()]).mean()
    ...     def state(self):
    ...         return {}
    ...     def load(self, state):
    ...         pass
    ...     def todict(self):
    ...         return {"name": self.name, "weight": self.weight}
    >>> make_terms([Small(), "teacher"])[0].name  # as Trainer(terms=[...]) takes them
    'small'
    """

    weight: float
    name: ClassVar[str]

    def check(self, pairs: Sequence[RelaxationPair]) -> None:
        """Raise for training pairs that the term cannot use, before any work; the method is optional."""

    def prepare(self, potential: Potential, pairs: Sequence[RelaxationPair]) -> None:
        """Remember the pretrained potential; called before the first epoch, and again when a run is resumed.

        In a resumed run `load` has been called before, and the state that it was given is kept: the potential is
        no longer the pretrained one.
        """

    def loss(self, potential: Potential, pairs: Sequence[RelaxationPair], rng: np.random.Generator) -> Tensor:
        """The term for a batch of the training pairs: a scalar, not yet times the weight, with a graph."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors on the CPU and plain values."""
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; call it before `prepare`."""

    def todict(self) -> dict[str, Any]:
        """Name, weight and settings, as JSON, from which `make_term` makes the same term."""
        raise NotImplementedError


TERMS: dict[str, type[WeightAnchor] | type[Distillation] | type[Labels] | type[ZeroForce]] = {
    term.name: term for term in (WeightAnchor, Distillation, Labels, ZeroForce)
}


def make_term(settings: dict[str, Any] | str) -> Term:
    """A term by name, with its defaults, or from what its `todict` returned; ValueError for names not in `TERMS`.

    Examples
    --------
    >>> from ase_bptt.terms import make_term
    >>> make_term({"name": "teacher", "weight": 2.0}).weight
    2.0
    """
    settings = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = settings.pop("name", None)
    return named(TERMS, name, "term")(**settings)


def make_terms(terms: Sequence[Term | dict[str, Any] | str] | str | None) -> list[Term]:
    """Copies of terms, or as `make_term` makes them; ValueError for two of one name.

    None is `Labels`, where the pairs have any. Copies, since a term remembers the potential that its training
    started from.

    Examples
    --------
    >>> from ase_bptt.terms import make_terms
    >>> [term.name for term in make_terms(["weight_anchor", {"name": "teacher", "weight": 2.0}])]
    ['weight_anchor', 'teacher']
    """
    if terms is None:
        return [Labels(required=False)]
    given = [terms] if isinstance(terms, str) else terms
    made = [make_term(term) if isinstance(term, (dict, str)) else copy.deepcopy(term) for term in given]
    if len({term.name for term in made}) < len(made):
        raise ValueError("Two terms of the loss have one name: give each once.")
    return made


def check_terms(terms: Sequence[Term], pairs: Sequence[RelaxationPair]) -> None:
    """Raise where a term cannot use these training pairs."""
    for term in terms:
        # A user's own term may lack the method.
        if hasattr(term, "check"):
            term.check(pairs)


def add_gradients(
    terms: Sequence[Term], potential: Potential, pairs: Sequence[RelaxationPair], key: Sequence[int]
) -> dict[str, float]:
    """Add the gradient of each term, times its weight, to ``.grad``; return the value of each, times its weight.

    Parameters
    ----------
    terms : sequence of Term
    potential : Potential
    pairs : sequence of RelaxationPair
        The batch of the step.
    key : sequence of int
        Of the step, as (seed, epoch, batch): what a term draws depends on nothing else, so a resumed run draws
        the same, and a further term changes nothing for the others.

    A term that is not finite adds nothing, and a warning is logged; neither does one that depends on no trained
    weight.
    """
    found = {}
    for term in terms:
        seed = [*key, *term.name.encode()]
        value = term.weight * term.loss(potential, pairs, np.random.default_rng(seed))
        found[term.name] = value.item()
        if not torch.isfinite(value):
            log.warning("The term %s is not finite and was left out of this step.", term.name)
        elif value.requires_grad:
            value.backward()
    return found
