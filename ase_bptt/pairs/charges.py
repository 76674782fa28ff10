"""Pairs of several charges: which are taken, and how much of the loss they leave where the input lacks it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from ase import Atoms

from ..charges import SPECIFIED, charge_and_spin
from ..losses import LOSSES
from . import InvalidPair, RelaxationPair
from .structure_matching import Equals

log = logging.getLogger(__name__)
NEUTRAL, ALL, EACH = CHOICES = ("neutral", "all", "each")
TINY = 1e-3
"""Of a loss: less is what rounding of positions leaves."""


def same_specified(initial: Atoms, relaxed: Atoms, name: str) -> None:
    """Give both ends of a relaxation the charge and spin that one of them has in its info.

    Raises
    ------
    InvalidPair
        Where the two have different ones.
    """
    for key in SPECIFIED:
        known = [atoms.info[key] for atoms in (initial, relaxed) if key in atoms.info]
        if len(known) == 1:
            initial.info[key] = relaxed.info[key] = known[0]
    before, after = charges_of((initial, relaxed), name)
    if before != after:
        raise InvalidPair(
            f"{name}: charge and spin change from {before[0]:g} and {before[1]:g} to {after[0]:g} and {after[1]:g}; "
            "give both structures the same."
        )


def charges_of(structures: Iterable[Atoms], name: str) -> list[tuple[float, float]]:
    """`charge_and_spin` of each; InvalidPair, with the name, where one is no number."""
    try:
        return [charge_and_spin(atoms) for atoms in structures]
    except ValueError as error:
        raise InvalidPair(f"{name}: {error}") from error


def of_charge(pairs: Sequence[RelaxationPair], choice: str | float) -> list[RelaxationPair]:
    """The pairs of one charge, "neutral" being 0, or "all".

    Raises
    ------
    InvalidPair
        Where there is none of it, with the charges that there are.
    """
    if choice == ALL:
        return list(pairs)
    wanted = 0.0 if choice == NEUTRAL else float(choice)
    found = [pair for pair in pairs if pair.charge == wanted]
    if not found:
        there = ", ".join(f"{q:+g}" if q else "0" for q in charges_in(pairs))
        raise InvalidPair(f"None of the {len(pairs)} pairs has the charge {wanted:g}; there are {there}.")
    return found


def charges_in(pairs: Iterable[RelaxationPair]) -> list[float]:
    """Each charge once, in order."""
    return sorted({pair.charge for pair in pairs})


def contradictions(
    pairs: Sequence[RelaxationPair], inputs: frozenset[str] = frozenset(), loss: str = "root_delta_q"
) -> tuple[list[RelaxationPair], float]:
    """The pairs that begin in one structure and end in several, and the part of the mean loss that this leaves.

    A potential that is given the same input ends in one place, X. With a loss that is a metric, as all of `LOSSES` but
    the squared one are, the sum over m such pairs is at least sum_(k<l) loss(R_k, R_l) / (m - 1) by the triangle
    inequality, wherever X is; for squared distances the sum is at least sum_(k<l) / m, at their mean.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    inputs : set of str
        Which of "charge" and "spin" the potential is given.
    loss : str
        Name of one of `LOSSES`; for any other "root_delta_q".

    Returns
    -------
    pairs : list of RelaxationPair
    bound : float
        A lower bound of the mean loss over all pairs, whatever the weights.
    """
    seen, together = Equals(), dict[Any, list[RelaxationPair]]()
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.group] = sizes.get(pair.group, 0) + 1
    for pair in pairs:
        # What begins alike is of one group. Pairs that are read on access, of which there may be many, are not read.
        if (sizes[pair.group] > 1 or not pair.group) and type(pair) is RelaxationPair:
            specified = dict(zip(SPECIFIED, charge_and_spin(pair.initial), strict=True))
            key = seen.add(pair.initial), repr(pair.freedom), *(specified[name] for name in sorted(inputs))
            together.setdefault(key, []).append(pair)
    found, total = [], 0.0
    squared, distance = loss == "squared_delta_q", LOSSES.get(loss, LOSSES["root_delta_q"])
    for same in together.values():
        apart = sum(float(distance(a.relaxed, b.relaxed)) for a, b in combinations(same, 2))
        least = apart / (len(same) if squared else max(1, len(same) - 1))
        if least > TINY * len(same):
            found += same
            total += least
    return found, total / max(1, len(pairs))


def warn_of_contradictions(
    pairs: Sequence[RelaxationPair], inputs: frozenset[str] = frozenset(), loss: str = "root_delta_q"
) -> None:
    """Say how much of the loss cannot fall, and because of which pairs, where this is so."""
    found, bound = contradictions(pairs, inputs, loss)
    if not found:
        return
    charges = charges_in(found) if "charge" not in inputs else []
    why = f" (charges {', '.join(f'{q:+g}' if q else '0' for q in charges)})" if len(charges) > 1 else ""
    log.warning(
        "%d of %d pairs%s begin in one structure and end in several, and their input to this potential is the same: of "
        "the mean loss (%s), %.3f cannot fall, whatever the weights; keep those of one charge (--charges).",
        len(found), len(pairs), why, loss if loss in LOSSES else "root_delta_q", bound,
    )  # fmt: skip
