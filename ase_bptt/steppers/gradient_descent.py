"""Gradient descent with momentum and an annealed step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from ..utils import check_positive
from .hyperparameters import SMALLEST, Ranges, hold, labelled, table
from .stepper import UNRESOLVED, State, Stepper, shortened

Number = float | nn.Parameter

SHARE = 0.5
"""Of the stability limit, for step_size="auto". Near a minimum, a step of 1/lambda_max overshoots along no direction
and ends at the bottom of the stiffest one, and the curvature may double along the path or in training before steps
climb. Momentum raises the limit to 2 (1 + momentum)/lambda_max, so it needs no shorter step."""


class GradientDescent(Stepper):
    """v <- momentum v + F;  X <- X + eta anneal^t v  (arXiv 2512.01067, with its annealed step).

    Parameters
    ----------
    step_size : float, Parameter, dict, sequence or "auto"
        eta in Å^2/eV. Stable below 2/lambda_max of the Hessian. A dict has one for each element, by its symbol; a
        sequence has one for each frame, the last of which also holds for all later frames; each of them may be a
        Parameter. "auto" is half the stability limit, and must be `resolve_step_size` before the first frame.
    anneal : float or Parameter
        Factor by which the step size falls with each frame, also where each frame has its own.
    momentum : float or Parameter
    maxstep : float
        Å. The longest atom step of a structure is capped by this, the others in proportion.

    Raises
    ------
    ValueError
        For numbers that are not positive, words other than "auto", and symbols that no element has.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import relax, steppers
    >>> relax("emt", molecule("N2"), stepper=steppers.GradientDescent(0.01, momentum=0.5))
    Relaxation: N2, converged after 11 frames, energy 0.2628 eV, fmax 0.0421 eV/Å
    """

    name = "gd"
    scale_sensitive = True
    fields = ("step_size", "anneal", "momentum", "maxstep")
    # Every step grows by a tenth at most where the anneal is learnt, lest a longer run than in training overflows.
    learnable: ClassVar[Ranges] = {
        "step_size": (SMALLEST, math.inf),
        "anneal": (SMALLEST, 1.1),
        "momentum": (0.0, 0.999),
    }

    def __init__(
        self,
        step_size: Number | Mapping[str, Number] | Sequence[Number] | str = 0.05,
        anneal: Number = 1.0,
        momentum: Number = 0.0,
        maxstep: float = 0.2,
    ):
        super().__init__()
        if isinstance(step_size, str) and step_size != "auto":
            raise ValueError(f"step_size is a number, numbers for elements or frames, or 'auto', not {step_size!r}.")
        self.step_size = hold("step_size", step_size)
        check_positive(**labelled("step_size", self.step_size), anneal=anneal, maxstep=maxstep)
        if isinstance(self.step_size, nn.ParameterDict):
            unknown = [repr(symbol) for symbol in self.step_size if symbol not in atomic_numbers]
            if unknown:
                raise ValueError(f"step_size is for elements by their symbols, and {', '.join(unknown)} is none.")
        self.anneal = anneal
        self.momentum = momentum
        self.maxstep = maxstep

    def init(self, positions: Tensor, n: int) -> State:
        state = State(structures={"frame": positions.new_zeros(n, dtype=torch.int64)})
        if self._has_momentum():
            state.atoms["velocities"] = torch.zeros_like(positions)
        return state

    def start(self, positions: Tensor, n: int, numbers: Tensor | None = None) -> State:
        """The state before the first frame, with the atomic numbers where each element has its own step size.

        Raises
        ------
        ValueError
            Where the rows are not atoms, and for elements without a step size, by name.
        """
        state = self.init(positions, n)
        if isinstance(self.step_size, nn.ParameterDict):
            state.atoms["numbers"] = _known(self.step_size, numbers)
        return state

    def step(self, positions: Tensor, forces: Tensor, state: State, batch: Tensor) -> tuple[Tensor, State]:
        frame = state.structures["frame"]
        velocities = forces
        atoms = {name: state.atoms[name] for name in ("numbers",) if name in state.atoms}
        if self._has_momentum():
            velocities = self.momentum * state.atoms["velocities"] + forces
            atoms["velocities"] = velocities
        moves = self._step_sizes(state, batch, positions)[:, None] * velocities
        moves = shortened(moves, batch, len(frame), self.maxstep)
        return positions + moves, State(atoms, {"frame": frame + 1})

    def resolve_step_size(self, limit: float) -> GradientDescent:
        """One whose step size is half of limit, where this one's is "auto"; they share the other hyperparameters."""
        if not isinstance(self.step_size, str):
            return self
        check_positive(limit=limit)
        return type(self)(**{k: getattr(self, k) for k in self.fields} | {"step_size": SHARE * limit})

    def _step_sizes(self, state: State, batch: Tensor, like: Tensor) -> Tensor:
        """eta anneal^t of each atom."""
        frame, eta = state.structures["frame"], self.step_size
        fade = torch.as_tensor(self.anneal, dtype=like.dtype, device=like.device) ** frame.to(like.dtype)
        if isinstance(eta, str):
            raise ValueError(UNRESOLVED.format(name="step_size"))
        if isinstance(eta, nn.ParameterDict):
            rows = torch.tensor([atomic_numbers[symbol] for symbol in eta], device=like.device)
            of_number = like.new_zeros(len(chemical_symbols)).index_put((rows,), table(eta, like))
            return of_number[state.atoms["numbers"]] * fade[batch]
        if isinstance(eta, nn.ParameterList):
            eta = table(eta, like)[frame.clamp(max=len(eta) - 1)]
        return (eta * fade)[batch]

    def _has_momentum(self) -> bool:
        return isinstance(self.momentum, nn.Parameter) or self.momentum != 0


def _known(step_sizes: nn.ParameterDict, numbers: Tensor | None) -> Tensor:
    """The atomic numbers, if each has a step size."""
    if numbers is None:
        raise ValueError(
            "A step size for each element moves atoms only, and what is relaxed here has other rows, as filters and "
            "bands have: give one step size."
        )
    found = [chemical_symbols[k] for k in numbers.unique().tolist()]
    missing = [symbol for symbol in found if symbol not in step_sizes]
    if missing:
        raise ValueError(
            f"step_size has no entry for {', '.join(missing)}, and the structures hold {', '.join(found)}: "
            "give one for each element."
        )
    return numbers
