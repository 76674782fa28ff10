"""BFGS and LBFGS, by ASE's formulas: update rules that learn curvatures, and are not differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils import check_positive
from .stepper import Learner, State, dot, shortened

SAME = 1e-7
"""Å (ASE's number). Where no coordinate moved farther, there is nothing to learn from."""


class BFGS(Learner):
    """Quasi-Newton steps with a whole Hessian for each structure, by the formulas of ASE's BFGS.

    The step is -V |w|^-1 V^T g with the eigenvalues w and eigenvectors V of the Hessian, so that it leads downhill
    along directions of negative curvature, too. A frame costs the eigenvalues of a matrix of (3 N)^2 numbers.

    Parameters
    ----------
    maxstep : float
        Å. The longest atom step of a structure is capped by this, the others in proportion.
    alpha : float
        eV/Å^2. The first Hessian is this times the identity.

    Examples
    --------
    >>> import torch
    >>> from ase.build import molecule
    >>> from ase_bptt import relax, steppers
    >>> with torch.no_grad():
    ...     relax("emt", molecule("N2"), stepper=steppers.BFGS())
    Relaxation: N2, converged after 3 frames, energy 0.2628 eV, fmax 0.0084 eV/Å
    """

    name = "bfgs"
    fields = ("maxstep", "alpha")
    learns_the_end = True

    def __init__(self, maxstep: float = 0.2, alpha: float = 70.0):
        super().__init__()
        check_positive(maxstep=maxstep, alpha=alpha)
        self.maxstep, self.alpha = maxstep, alpha

    def init(self, positions: Tensor, n: int) -> State:
        none = positions.new_zeros(len(positions), 0, positions.shape[1], dtype=torch.float64)
        return State({"positions": none, "forces": none}, lists={"hessian": (none.new_zeros(0, 0),) * n})

    def observe(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> State:
        x, f = positions.double(), forces.double()
        hessians = state.lists["hessian"]
        counts = _counts(batch, len(hessians))
        known = tuple(
            h if len(h) else _identity(count * x.shape[1], x) * self.alpha for h, count in zip(hessians, counts)
        )
        if state.atoms["positions"].shape[1]:
            moved = _apart(x - state.atoms["positions"][:, 0], counts)
            change = _apart(state.atoms["forces"][:, 0] - f, counts)
            # One that has just joined the batch has not moved yet.
            known = tuple(
                _updated(h, s.flatten(), y.flatten()) if len(before) else h
                for h, s, y, before in zip(known, moved, change, hessians)
            )
        return State({"positions": x[:, None], "forces": f[:, None]}, lists={"hessian": known})

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        state = self.observe(positions, forces, state, batch)
        x, f, hessians = state.atoms["positions"][:, 0], state.atoms["forces"][:, 0], state.lists["hessian"]
        counts = _counts(batch, len(hessians))
        moves = torch.cat([_newton(h, part.flatten()).view_as(part) for h, part in zip(hessians, _apart(f, counts))])
        moves = shortened(moves, batch, len(hessians), self.maxstep)
        return (x + moves).to(positions.dtype), state


def _counts(batch: Tensor, n: int) -> list[int]:
    counts: list[int] = torch.bincount(batch, minlength=n).tolist()
    return counts


def _apart(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of each structure, in memory of their own.

    A view of the batch may begin anywhere, and BLAS adds up in another order where a vector is not aligned: the last
    bits would not be those of the structure alone, and BFGS amplifies them from frame to frame.
    """
    return [part.clone() for part in rows.split(counts)]


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=like.device)


def _updated(hessian: Tensor, moved: Tensor, change: Tensor) -> Tensor:
    """The Hessian that maps this move to this change of the gradient, and is otherwise close to the old one."""
    if not bool((moved.abs() >= SAME).any()):
        return hessian
    image = hessian @ moved
    along, before = moved @ change, moved @ image
    # Where the gradient does not change along the move (a constant force), ASE's rule divides zero by zero.
    if not (along and before):
        return hessian
    return hessian + (torch.outer(change, change) / along - torch.outer(image, image) / before)


def _newton(hessian: Tensor, forces: Tensor) -> Tensor:
    """The step of one structure; not a number where its Hessian has no eigenvalues, so that its run ends."""
    try:
        values, vectors = torch.linalg.eigh(hessian)
    except torch.linalg.LinAlgError:
        return torch.full_like(forces, torch.nan)
    return vectors @ ((forces @ vectors) / values.abs())


class LBFGS(Learner):
    """Quasi-Newton steps from the latest frames instead of a Hessian, by the formulas of ASE's LBFGS.

    A frame costs sums over the frames that are remembered; they take 48 bytes an atom each.

    Parameters
    ----------
    maxstep : float
        Å. The longest atom step of a structure is capped by this, the others in proportion.
    memory : int
        Moves that are remembered.
    damping : float
        Every step is multiplied by this after it was capped.
    alpha : float
        eV/Å^2. Curvature along directions that no remembered move has gone.

    Examples
    --------
    >>> import torch
    >>> from ase.build import molecule
    >>> from ase_bptt import relax, steppers
    >>> with torch.no_grad():
    ...     relax("emt", molecule("N2"), stepper=steppers.LBFGS(memory=10))
    Relaxation: N2, converged after 3 frames, energy 0.2628 eV, fmax 0.0084 eV/Å
    """

    name = "lbfgs"
    fields = ("maxstep", "memory", "damping", "alpha")
    learns_the_end = False

    def __init__(self, maxstep: float = 0.2, memory: int = 100, damping: float = 1.0, alpha: float = 70.0):
        super().__init__()
        check_positive(maxstep=maxstep, damping=damping, alpha=alpha)
        if memory < 0:
            raise ValueError(f"memory must not be negative, got {memory}.")
        self.maxstep, self.memory, self.damping, self.alpha = maxstep, memory, damping, alpha

    def init(self, positions: Tensor, n: int) -> State:
        none = positions.new_zeros(len(positions), 0, positions.shape[1], dtype=torch.float64)
        return State({"positions": none, "forces": none}, {"frame": positions.new_zeros(n, dtype=torch.int64)})

    def observe(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> State:
        new = {"positions": positions.double(), "forces": forces.double()}
        atoms = {name: torch.cat((old, new[name][:, None]), dim=1) for name, old in state.atoms.items()}
        latest = {name: frames[:, -(self.memory + 1) :] for name, frames in atoms.items()}
        return State(latest, {"frame": state.structures["frame"] + 1})

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        state = self.observe(positions, forces, state, batch)
        n = len(state.structures["frame"])
        moves = self._newton(state, batch, n)
        moves = shortened(moves, batch, n, self.maxstep) * self.damping
        return (state.atoms["positions"][:, -1] + moves).to(positions.dtype), state

    def _newton(self, state: State, batch: Tensor, n: int) -> Tensor:
        """The inverse Hessian of the remembered frames (n_atoms, m + 1, 3), applied to the latest forces."""
        positions, forces, frame = state.atoms["positions"], state.atoms["forces"], state.structures["frame"]
        # A structure that joined the batch later has fewer frames behind it, and zeros before them.
        age = torch.arange(positions.shape[1] - 1, 0, -1, device=frame.device)
        taken = (age < frame[:, None])[batch][:, :, None]
        moved = torch.where(taken, positions.diff(dim=1), 0.0).unbind(1)
        change = torch.where(taken, -forces.diff(dim=1), 0.0).unbind(1)
        curvatures = [dot(s, y, batch, n) for s, y in zip(moved, change)]
        # A frame without a move (forces of zero) says nothing; ASE's rule divides by zero there.
        inverse = [torch.where(c == 0, 0.0, 1 / torch.where(c == 0, 1.0, c)) for c in curvatures]
        step, weights = forces[:, -1], []
        for s, y, rho in reversed(list(zip(moved, change, inverse))):
            weights.append(rho * dot(s, step, batch, n))
            step = step - weights[-1][batch, None] * y
        step = step * (1 / self.alpha)
        for s, y, rho, weight in zip(moved, change, inverse, reversed(weights)):
            step = step + (weight - rho * dot(y, step, batch, n))[batch, None] * s
        return step
