"""The outcomes of a cross-validation's folds, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation import Evaluation
from ..pairs import RelaxationPair
from .outcome import Outcome, card_of_folds


def as_one(
    outcomes: Sequence[Outcome],
    pairs: Sequence[RelaxationPair],
    out: Path,
    *,
    seconds: float,
    facts: Mapping[str, str],
) -> Outcome:
    """The outcome of all folds together, each pair where it was held out.

    Parameters
    ----------
    outcomes : sequence of Outcome
        One for each fold.
    pairs : sequence of RelaxationPair
        Of all folds; their order is that of the rows.
    out : Path
        The run folder that the folds lie in.
    seconds : float
    facts : mapping of str to str
        As for `finetune`.
    """
    return Outcome(
        out,
        before=_in_order([o.before for o in outcomes], pairs),
        after=_in_order([o.after for o in outcomes], pairs),
        before_bfgs=_in_order([o.before_bfgs for o in outcomes], pairs),
        after_bfgs=_in_order([o.after_bfgs for o in outcomes], pairs),
        history=[],
        seconds=seconds,
        folds=len(outcomes),
        facts=dict(facts) | _learnt_by_folds(outcomes),
        card=card_of_folds(outcomes),
    )


def _in_order(evaluations: Sequence[Evaluation], pairs: Sequence[RelaxationPair]) -> Evaluation:
    """All folds' rows and ends in one evaluation, in the order of the pairs."""
    place = {pair.id: k for k, pair in enumerate(pairs)}
    rows = [row for e in evaluations for row in e.rows]
    ends = [atoms for e in evaluations for atoms in e.ends]
    order = sorted(range(len(rows)), key=lambda k: place[rows[k].id])
    return Evaluation(tuple(rows[k] for k in order), tuple(ends[k] for k in order) if len(ends) == len(rows) else ())


def _learnt_by_folds(outcomes: Sequence[Outcome]) -> dict[str, str]:
    said = [f"fold {k}: {o.facts['learnt']}" for k, o in enumerate(outcomes) if "learnt" in o.facts]
    return {"learnt": "; ".join(said)} if said else {}
