"""The time and the memory that a training takes, from a few small measurements and a scaling law."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..neighbors import find_edges
from ..pairs import RelaxationPair
from ..potential import Potential
from ..relaxation import relax
from ..structures import Structures
from ..terms import Term, add_gradients
from ..throughput import ATOMS
from ..throughput.memory import peak_bytes
from .distributed import Ranks
from .pair_loss import PairLoss
from .training_data import TrainingData

FRAMES = 80
"""Of a relaxation by FIRE or BFGS to 0.02 eV/Å, roughly."""
PROBED = 2
"""Frames of the relaxation that is timed."""
BUDGET = 16.0
"""Seconds that the measurements of an estimate may take, roughly."""
STEP_COST, STEP_MEMORY = 5.0, 3.5
"""Of a training step of one frame, in evaluations of forces: seconds (CHGNet, MACE: 4 to 5) and bytes (3 to 4, 2 to 3);
used where the smallest pair is too large to measure it."""
TRIED = 4
"""Structures that are relaxed, for the number of frames."""
SAMPLED = 16
"""Structures whose edges are counted."""
LONG = 6.0
"""Å: taken for an infinite cutoff."""
MEASUREMENTS = 8
"""Before and after, by FIRE and by BFGS, from the initial and the reference structures."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of an epoch and of the whole run, and bytes of all tensors at the peak of a training step."""

    seconds_per_epoch: float
    seconds: float
    peak_bytes: int

    def todict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"about {_duration(self.seconds)} ({_duration(self.seconds_per_epoch)} an epoch), "
            f"{_size(self.peak_bytes)} of tensors at the peak"
        )


@dataclass(frozen=True)
class CostLaw:
    """Seconds of a computation on a batch: a share that is the same for each batch, and one for each edge."""

    a_batch: float
    an_edge: float

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> CostLaw:
        """The law through two measurements, each of the edges and the seconds; of two alike the second counts alone."""
        (few, short), (many, long) = small, large
        if many < 1.5 * few:
            return cls(0.0, long / many)
        # Where the first is slower than in proportion to the second, all of the difference is the batch's.
        an_edge = min(max((long - short) / (many - few), 0.0), long / many)
        return cls(max(0.0, long - an_edge * many), an_edge)

    def seconds(self, batches: float, edges: float) -> float:
        """Of so many batches with so many edges together."""
        return self.a_batch * batches + self.an_edge * edges


def estimate(
    loss: PairLoss, data: TrainingData, terms: Sequence[Term] = (), *, batch_size: int, epochs: int
) -> Estimate:
    """Time a few small computations, and scale them by edges and frames; nothing is changed or written.

    One frame is timed on the smallest training pair, and on as many of the largest as `BUDGET` allows; all frames are
    on the smallest, where that is soon done, and else taken to cost as much as the first. Where one frame of the
    smallest pair takes long, an evaluation of its forces is timed instead. A relaxation of the validation is run for a
    few structures, or else taken to need `FRAMES`.

    Parameters
    ----------
    loss : PairLoss
    data : TrainingData
    terms : sequence of Term
        Further terms of the loss.
    batch_size : int
    epochs : int
        Epochs to run.
    """
    potential, size = loss.potential, loss.ranks.size
    edges = _edge_counts(potential, data)
    by_size = sorted(data.train, key=lambda p: p.n_atoms)
    # A copy: the ends for warm starts and the counters of the epoch stay as they are.
    costs = _measured(replace(loss, warm=None, ranks=Ranks(), first=0), by_size, edges, terms, batch_size)
    some = sorted(data.valid, key=lambda p: p.n_atoms)[:TRIED]
    n_frames = _frames_to_relax(potential, some, costs.forces.seconds(1, edges(some)))

    def relaxed(pairs: Sequence[RelaxationPair]) -> float:
        batches = math.ceil(sum(p.n_atoms for p in pairs) / ATOMS) if potential.device.type == "cpu" else 1
        return n_frames * costs.forces.seconds(batches, edges(pairs))

    training = costs.step.seconds(math.ceil(len(by_size) / batch_size), edges(by_size)) * costs.with_terms
    epoch = (training + relaxed(data.valid)) / size
    for parameter in loss.trained():
        parameter.grad = None
    peak = costs.bytes_an_edge * edges(by_size[-batch_size:])
    return Estimate(epoch, epochs * epoch + MEASUREMENTS * relaxed(data.test) / size, round(peak))


@dataclass(frozen=True)
class Costs:
    """Of a training step and of an evaluation of forces; the factor by which terms slow a step; bytes at its peak."""

    step: CostLaw
    forces: CostLaw
    with_terms: float
    bytes_an_edge: float


def _measured(
    loss: PairLoss,
    by_size: Sequence[RelaxationPair],
    edges: Callable[[Sequence[RelaxationPair]], float],
    terms: Sequence[Term],
    batch_size: int,
) -> Costs:
    """The costs, from the smallest pair and from as many of the largest as the budget allows."""
    potential, small = loss.potential, by_size[:1]
    n_small, frames = edges(small), min(loss.steps, FRAMES)
    evaluate = partial(_seconds_per_frame, potential, small, 0)
    once = evaluate()  # with what is compiled or allocated at first use
    once = evaluate() if once < BUDGET / 8 else once
    if once > BUDGET / 40:
        # One step would take too long.
        frame, forces = STEP_COST * once, CostLaw(0.0, once / n_small)
        _, peak = peak_bytes(evaluate, potential.device)
        step = CostLaw(0.0, frame * (1 + frames) / 2 / n_small)
        return Costs(step, forces, 1 + 2 * len(terms) / (1 + frames), STEP_MEMORY * peak / n_small)
    one = replace(loss, steps=1)
    one.backward(small)
    frame = seconds(partial(one.backward, small))
    whole = frame * (1 + frames) / 2
    if whole < BUDGET / 4:
        whole = seconds(partial(loss.backward, small))
    batches = [by_size[-k:] for k in range(min(batch_size, len(by_size)), 0, -1)]
    singles = [by_size[len(by_size) // k :][:1] for k in (2, 4, 8)]
    large = next((p for p in [*batches, *singles] if frame * edges(p) / n_small < BUDGET / 5), small)
    law = CostLaw.through((n_small, frame), (edges(large), seconds(partial(one.backward, large))))
    forces = CostLaw.through(*((edges(p), _seconds_per_frame(potential, p)) for p in (small, large)))
    step = CostLaw(law.a_batch * whole / frame, law.an_edge * whole / frame)
    by_terms = _seconds_of_terms(terms, potential, small) / whole
    return Costs(step, forces, 1 + by_terms, _peak(loss, small, frame) / n_small)


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


def _edge_counts(potential: Potential, data: TrainingData) -> Callable[[Sequence[RelaxationPair]], float]:
    """A function that gives the edges of pairs, in proportion to their atoms, by what some of them have."""
    every = [*data.train, *data.valid, *data.test]
    some = [pair.initial for pair in every[:: max(1, len(every) // SAMPLED)]]
    cutoff = float(potential.cutoff) if math.isfinite(potential.cutoff) else LONG
    n_edges = sum(len(find_edges(Structures.from_atoms(atoms), cutoff).i) for atoms in some)
    per_atom = 1 + n_edges / sum(map(len, some))
    return lambda pairs: per_atom * sum(p.n_atoms for p in pairs)


def _seconds_per_frame(potential: Potential, pairs: Sequence[RelaxationPair], steps: int = PROBED) -> float:
    with torch.no_grad():
        starts = [p.initial for p in pairs]
        return seconds(lambda: relax(potential, starts, stepper="fire", fmax=0.0, steps=steps)) / (steps + 1)


def _frames_to_relax(potential: Potential, pairs: Sequence[RelaxationPair], a_frame: float) -> float:
    """How many frames a relaxation takes: of these, where that is soon found, else `FRAMES`."""
    if not pairs or a_frame * FRAMES > BUDGET / 4:
        return FRAMES
    with torch.no_grad():
        found = relax(potential, [p.initial for p in pairs], stepper="fire", fmax=0.02, steps=FRAMES)
    return 1 + float(found.nsteps.double().mean())


def _seconds_of_terms(terms: Sequence[Term], potential: Potential, pairs: Sequence[RelaxationPair]) -> float:
    """Of copies, for a term remembers the potential and the pairs that it is prepared with."""
    copies = copy.deepcopy(list(terms))
    for term in copies:
        term.prepare(potential, pairs)
    return seconds(lambda: add_gradients(copies, potential, pairs, (0, 0, 0)))


def _peak(loss: PairLoss, pairs: Sequence[RelaxationPair], frame: float) -> float:
    """Bytes at the peak of all frames, from those of the first and what the second adds."""
    peaks = [
        peak_bytes(partial(replace(loss, steps=steps).backward, pairs), loss.potential.device)[1]
        for steps in range(1, 2 + (frame < BUDGET / 10))
    ]
    return peaks[0] + max(0, peaks[-1] - peaks[0]) * (min(loss.steps, FRAMES) - 1)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
