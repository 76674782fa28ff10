"""The pairs of a training: checked once, and drawn in batches, from augmented starts, in each epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..cells.row_maps import allowed
from ..displacements import displacements, shortest_lattice_vector
from ..pairs import RelaxationPair, fingerprint
from ..pairs.charges import warn_of_contradictions
from ..pairs.groups import check_apart
from ..pairs.lazy import DeferredPair
from ..pairs.targets import Target
from ..pairs.usable import usable
from ..potential import Potential
from ..terms import Term, check_terms
from .settings import SamplingSettings


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Pairs that a Trainer has checked.

    Attributes
    ----------
    train, valid, test : sequence of RelaxationPair
        To train on, to choose the best epoch by, and to measure the gain on; the last two may be empty.
    fingerprint : str
        Hash of the pairs of `train` and `valid`, on which the tuned weights depend.
    held_out : str
        Hash of the pairs of `test`.
    """

    train: Sequence[RelaxationPair]
    valid: Sequence[RelaxationPair]
    test: Sequence[RelaxationPair]
    fingerprint: str
    held_out: str

    def splits(self) -> dict[str, Sequence[RelaxationPair]]:
        """The pairs by the name of their split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def check_data(
    potential: Potential,
    terms: Sequence[Term],
    train: Sequence[RelaxationPair],
    valid: Sequence[RelaxationPair] = (),
    test: Sequence[RelaxationPair] = (),
    *,
    unique_ids: bool = False,
    loss: str = "root_delta_q",
) -> TrainingData:
    """Check everything about the pairs that can be checked before any work.

    Parameters
    ----------
    potential : Potential
    terms : sequence of Term
        Further terms of the loss.
    train, valid, test : sequence of RelaxationPair
    unique_ids : bool
        Whether training pairs must have different ids.
    loss : str
        Name of that of the Trainer, for how much of it pairs that contradict each other leave.

    Raises
    ------
    ValueError
        Without training pairs, for a group in two splits, for pairs that a term cannot use, for equal ids.
    NotImplementedError
        For constraints or elements that cannot be treated, by name.
    """
    if not train:
        raise ValueError("There are no pairs to train on.")
    check_apart(training=train, validation=valid, test=test)
    if unique_ids:
        _check_ids(train)
    usable(potential, [*train, *valid, *test])
    warn_of_contradictions(train, potential.inputs, loss)
    check_terms(terms, train)
    return TrainingData(train, valid, test, fingerprint([*train, *valid]), fingerprint(test))


def _check_ids(pairs: Sequence[RelaxationPair]) -> None:
    [(name, times)] = Counter(pair.id for pair in pairs).most_common(1)
    if times > 1:
        raise ValueError(f"Two training pairs are called {name!r}: give each a name of its own for warm starts.")


def combined_hash(hashes: Sequence[str]) -> str:
    """One hash for several, in order."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class Order:
    """Training pairs in batches, in another order and from other starts in each epoch.

    Parameters
    ----------
    sampling : SamplingSettings

    Attributes
    ----------
    generator : torch.Generator
        Draws the order; its state belongs into a checkpoint.
    """

    def __init__(self, sampling: SamplingSettings):
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def n_batches(self, n_pairs: int) -> int:
        """Batches in an epoch of so many pairs."""
        return -(-n_pairs // self.sampling.batch_size)

    def batches(self, pairs: Sequence[RelaxationPair], epoch: int, passes: int = 1) -> Iterator[list[RelaxationPair]]:
        """The batches of an epoch, each pass in an order of its own."""
        drawn = self.sampling
        pairs = VariedStarts(pairs, drawn.interpolate, drawn.rattle, (drawn.seed, epoch))
        for _ in range(passes):
            order = torch.randperm(len(pairs), generator=self.generator).tolist()
            for first in range(0, len(order), drawn.batch_size):
                yield [pairs[k] for k in order[first : first + drawn.batch_size]]


class VariedStarts(Sequence[RelaxationPair]):
    """Pairs with starts drawn on the straight line to the reference (a share of them), and rattled.

    Those of a `Target` are drawn about it. A start is made when it is asked for, and depends on the key and the place
    of its pair alone.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    along : float
        Share of the starts that are drawn on the line.
    rattle : float
        Å.
    key : sequence of int
        Seeds the random numbers, such as (seed, epoch).
    """

    def __init__(self, pairs: Sequence[RelaxationPair], interpolate: float, rattle: float, key: Sequence[int]):
        self._pairs, self._interpolate, self._rattle, self._key = pairs, interpolate, rattle, key

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, k: Any) -> Any:
        return varied_pair(self._pairs[k], partial(self._made, k))

    def _made(self, k: int) -> RelaxationPair:
        pair, rng = self._pairs[k], np.random.default_rng([*self._key, k])
        if isinstance(pair, Target):
            return dataclasses.replace(pair, initial=pair.start(rng))
        share = rng.uniform() if rng.uniform() < self._interpolate else 0.0
        noise = rng.normal(0, self._rattle, (pair.n_atoms, 3))
        start = pair.initial.copy()
        # Minimum images are expensive.
        shift = share * displacements(pair.relaxed, pair.initial).numpy() if share else 0.0
        # With constraints applied, as in a relaxation.
        start.set_positions(start.positions + shift + noise)
        if pair.freedom.moves:
            start.set_cell(self._cell(pair, share, rng), scale_atoms=True, apply_constraint=False)
        return dataclasses.replace(pair, initial=start, cell=pair.freedom)

    def _cell(self, pair: RelaxationPair, share: float, rng: np.random.Generator) -> np.ndarray:
        """The cell on the line to the reference's, strained by as much as the atoms are rattled."""
        cell, periodic = pair.initial.cell.array, pair.initial.pbc
        cell = cell + share * (pair.relaxed.cell.array - cell)
        noise = rng.normal(0, self._rattle, (3, 3))
        strain = (noise + noise.T) / 2 / (shortest_lattice_vector(pair.relaxed) / pair.n_atoms ** (1 / periodic.sum()))
        return cell @ (np.eye(3) + allowed(strain, pair.initial, pair.freedom))


class VariedPair(DeferredPair):
    """A pair whose start is made, and whose structures are read, when one of them is asked for; they are kept then."""

    __slots__ = ("_full", "_make", "_of")
    _of: RelaxationPair
    _make: Callable[[], RelaxationPair]
    _full: RelaxationPair | None

    def made(self) -> RelaxationPair:
        """The pair as an ordinary one."""
        if self._full is None:
            object.__setattr__(self, "_full", self._make())
        assert self._full is not None
        return self._full

    @property
    def id(self) -> str:  # type: ignore[override]
        return self._of.id

    @property
    def group(self) -> str:  # type: ignore[override]
        return self._of.group

    @property
    def n_atoms(self) -> int:
        return self._of.n_atoms

    @property
    def kind(self) -> str:
        return self._of.kind

    def __reduce__(self) -> tuple[Any, ...]:
        full = self.made()
        return RelaxationPair, (*(getattr(full, field.name) for field in dataclasses.fields(RelaxationPair)),)


def varied_pair(of: RelaxationPair, make: Callable[[], RelaxationPair]) -> VariedPair:
    """The pair that `make` gives, known by what `of` knows without being read."""
    pair: VariedPair = object.__new__(VariedPair)
    # A pair is frozen.
    for name, value in (("_of", of), ("_make", make), ("_full", None)):
        object.__setattr__(pair, name, value)
    return pair
