"""How a relaxation is differentiated, apart from how it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .frames import Record
from .steppers import State


class Adjoint:
    """The way from the gradient at the relaxed positions to the weights and the initial positions."""

    name: ClassVar[str]
    on_tape: ClassVar[bool] = False
    """Whether the frames must run on autograd's tape."""
    keeps_frames: ClassVar[bool] = False
    """Whether the states of all frames must be recorded."""

    def attach(self, record: Record, final: Tensor) -> Tensor:
        """The relaxed positions, with their gradient attached."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class FullTape(Adjoint):
    """Keep the graph of every frame: exact, memory grows with every frame. For tests and small cases."""

    name = "full"
    on_tape = True

    def attach(self, record: Record, final: Tensor) -> Tensor:
        return _Guarded.apply(final, record)


class Replay(Adjoint):
    """Keep the stepper's states only and run each frame again on the way back: exact, flat in memory.

    A frame costs one more force call; benchmarks/tape.py compares time and memory.
    """

    name = "replay"
    keeps_frames = True

    def attach(self, record: Record, final: Tensor) -> Tensor:
        start = record.start
        return _Replayed.apply(record, final.detach(), start.positions, start.cells, *record.map.parameters())


ADJOINTS: dict[str, type[Adjoint]] = {cls.name: cls for cls in (FullTape, Replay)}


def make_adjoint(adjoint: str | Adjoint | None) -> Adjoint | None:
    """An adjoint by name ("replay", "full"), or the object itself."""
    if adjoint is None or isinstance(adjoint, Adjoint):
        return adjoint
    if adjoint not in ADJOINTS:
        raise ValueError(f"There is no adjoint {adjoint!r}; there are {', '.join(ADJOINTS)}.")
    return ADJOINTS[adjoint]()


class _Guarded(torch.autograd.Function):
    """The identity, refusing to go backward with other weights than forward."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, record: Record) -> Tensor:  # type: ignore[override]
        ctx.record = record
        return final.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.record.check_weights()
        return gradient, None


class _Replayed(torch.autograd.Function):
    """The whole relaxation as one node of the graph."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, record: Record, final: Tensor, positions: Tensor, cells: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.record, ctx.weights = record, weights
        ctx.with_cells = cells.requires_grad
        # The frames begin from these very tensors: let torch notice when they change in place.
        ctx.save_for_backward(positions, cells)
        return final.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.record.check_weights()
        _, cells = ctx.saved_tensors
        # Some may have been frozen since.
        weights = [p for p in ctx.weights if p.requires_grad]
        sums = _Sums([cells] * ctx.with_cells + weights)
        positions = replay(ctx.record, gradient, weights, sums)
        to_cells = sums.values.pop(0) if ctx.with_cells else None
        found = iter(sums.values)
        to_weights = [next(found) if p.requires_grad else None for p in ctx.weights]
        return None, None, positions, to_cells, *to_weights


class _Sums:
    """Gradients that every frame adds to: of the cells (where wanted) and of the weights."""

    def __init__(self, inputs: Sequence[Tensor]):
        self.values: list[Tensor | None] = [None] * len(inputs)

    def add(self, k: int, value: Tensor | None) -> None:
        old = self.values[k]
        self.values[k] = value if old is None else old if value is None else old + value


def replay(record: Record, gradient: Tensor, weights: list[Tensor], sums: _Sums) -> Tensor:
    """Go back through the frames: from dL/dX(T) to dL/dX(0), adding up dL/dcells and dL/dweights.

    The adjoint equations are lambda(t) = (d frame / d X(t))^T lambda(t+1), with the stepper's state
    beside X; a structure that had stopped before frame t passes its lambda through unchanged.
    """
    iterated, start = record.map, record.start
    with_cells = len(sums.values) > len(weights)
    neighbors = iterated.neighbor_list()
    adjoint = gradient.clone()
    state_adjoint: State | None = None
    moving: list[int] = []
    for t in reversed(range(len(record.frames))):
        now = record.moving(t)
        positions, state = record.before(t)
        if now != moving:
            # Structures that stopped after frame t enter with a state that nothing depends on.
            state_adjoint = _widened(state_adjoint, state, moving, now, start.counts)
            moving, atoms = now, start.atoms_of(now)
            members = start.select(now)
        assert state_adjoint is not None
        x = positions.clone().requires_grad_()
        carried = [s.clone().requires_grad_() for s in state.floats()]
        cells = members.cells.detach().requires_grad_(with_cells)
        with torch.enable_grad():
            structures = members.replace(positions=x, cells=cells)
            outputs = iterated.frame(structures, state.with_floats(carried), neighbors)
        found = _pull_back(
            (outputs[0], *outputs[1].floats()),
            (adjoint[atoms], *state_adjoint.floats()),
            [x, *carried, *[cells] * with_cells, *weights],
        )
        adjoint[atoms] = _or_zero(found[0], x)
        back = [_or_zero(g, s) for g, s in zip(found[1 : 1 + len(carried)], carried, strict=True)]
        state_adjoint = state.with_floats(back)
        rest = found[1 + len(carried) :]
        if with_cells:
            full = torch.zeros_like(start.cells)
            full[now] = _or_zero(rest[0], cells)
            sums.add(0, full)
        for k, g in enumerate(rest[with_cells:]):
            sums.add(k + with_cells, g)
    _through_the_start(record, state_adjoint, weights, sums)
    return adjoint


def _through_the_start(record: Record, state_adjoint: State | None, weights: list[Tensor], sums: _Sums) -> None:
    """The first state may depend on the stepper's own parameters."""
    if state_adjoint is None or not any(p.requires_grad for p in record.map.stepper.parameters()):
        return
    with torch.enable_grad():
        state = record.map.start(record.start.select(record.moving(0)))
    offset = len(sums.values) - len(weights)
    for k, g in enumerate(_pull_back(state.floats(), state_adjoint.floats(), weights)):
        sums.add(k + offset, g)


def _pull_back(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    live = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    if not live:
        return [None] * len(inputs)
    outs, grads = zip(*live, strict=True)
    return list(torch.autograd.grad(outs, list(inputs), grads, allow_unused=True))


def _widened(old: State | None, like: State, before: list[int], now: list[int], counts: tuple[int, ...]) -> State:
    """The state's adjoint of the structures `now`: zero, but for those that moved before."""
    new = like.map(torch.zeros_like)
    if old is None:
        return new
    rows = [now.index(k) for k in before]
    atoms: list[int] = []
    for k in before:
        first = sum(counts[m] for m in now[: now.index(k)])
        atoms += range(first, first + counts[k])
    for name, value in old.atoms.items():
        new.atoms[name][atoms] = value
    for name, value in old.structures.items():
        new.structures[name][rows] = value
    for name, values in old.lists.items():
        listed = dict(enumerate(new.lists[name])) | dict(zip(rows, values, strict=True))
        new.lists[name] = tuple(listed[k] for k in range(len(listed)))
    return new


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
