"""Whether the gradient of a relaxation is to be trusted: stability limit, spectral radius, adjoint norms, alarms."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..adjoints import SolveStatus
from ..iterated_map import Status
from ..result import Relaxation
from ..steppers.gradient_descent import SHARE
from ..utils import without_nan
from .gradients import ITERATIONS, Vitals, measure

EXPLODING = 1e3
"""A gradient that grows by more than this on its way is decided by few frames."""
FADING = 1e-3
"""A gradient that falls below this tells the first frames nothing."""
UNSTABLE = 1e-3
"""A spectral radius above 1 by no more may be due to rounding, and to forces that have not quite vanished."""
ROWS = 20
"""Structures told of one by one in the text."""
WIDTH = 80


@dataclass(frozen=True)
class Health:
    """The health of the gradients of a batch; what `health` gives back.

    Attributes
    ----------
    structures : tuple of Vitals
    stepper : dict
        Name and numbers of the stepper whose frames these are.
    """

    structures: tuple[Vitals, ...]
    stepper: dict[str, Any]

    @property
    def step_limit(self) -> float:
        """The smallest 2/lambda_max in Å^2/eV where the structures ended; infinite where nothing is stiff."""
        return min((v.step_limit for v in self.structures if not math.isnan(v.step_limit)), default=math.nan)

    @property
    def alarms(self) -> tuple[str, ...]:
        """What is wrong and how to mend it, a sentence or two each; empty where all is well."""
        return (*self._of_ends(), *self._of_solves(), *self._of_steps(), *self._of_paths())

    def todict(self) -> dict[str, Any]:
        """All of it, as JSON; None for what is missing or not finite."""
        found = {
            "stepper": self.stepper,
            "step_limit": self.step_limit,
            "alarms": self.alarms,
            "structures": [v.todict() for v in self.structures],
        }
        return without_nan(found)

    def to_json(self) -> str:
        """`todict` as text."""
        return json.dumps(self.todict(), indent=1, allow_nan=False)

    def text(self) -> str:
        """For people, at 80 columns: a line for each structure, then the alarms."""
        numbers = ", ".join(f"{k} {_short(v)}" for k, v in self.stepper.items() if k != "name")
        lines = [
            _filled(f"Gradient health (structures: {len(self.structures)}; {self.stepper['name']}: {numbers})", "")
        ]
        lines.append("structure  frames  2/lambda_max  radius  halves in    growth  largest at  solve")
        lines += [_row(k, v) for k, v in enumerate(self.structures[:ROWS])]
        if len(self.structures) > ROWS:
            lines.append(f"  and {len(self.structures) - ROWS} more")
        lines += [_filled(alarm, "! ") for alarm in self.alarms] or ["No alarm."]
        return "\n".join(lines)

    def _of_ends(self) -> Iterator[str]:
        for status in (Status.DIVERGED, Status.OUT_OF_STEPS):
            members = [k for k, v in enumerate(self.structures) if v.status is status and not _meant_or_told(v)]
            if members:
                yield f"{_named(members)}: not relaxed ({status.value}). {status.sentence}"

    def _of_solves(self) -> Iterator[str]:
        for status in (SolveStatus.UNRELAXED, SolveStatus.SADDLE, SolveStatus.CAPPED):
            members = [k for k, v in enumerate(self.structures) if v.solve and v.solve.status is status]
            if status is SolveStatus.UNRELAXED:
                members = [k for k in members if self.structures[k].status is Status.OUT_OF_STEPS]
            if members:
                yield f"{_named(members)}: the implicit gradient is unsolved ({status.value}). {status.sentence}"

    def _of_steps(self) -> Iterator[str]:
        momentum = self.stepper.get("momentum", 0.0)
        bounds = [(1 + momentum) * v.step_limit for v in self.structures]
        growing = [v.radius is not None and v.radius > 1 + UNSTABLE for v in self.structures]
        long = [v.step_size is not None and v.step_size > b for v, b in zip(self.structures, bounds, strict=True)]
        if isinstance(self.stepper.get("step_size"), dict):
            # The longest step may be that of an element which is soft.
            long = [a and b for a, b in zip(long, growing, strict=True)]
        too_long = [k for k, is_long in enumerate(long) if is_long]
        if too_long:
            least = min(bounds[k] for k in too_long)
            yield (
                f"{_named(too_long)}: the step size is above the stability limit of {least:.3g} Å^2/eV"
                f"{f' with momentum {momentum:g}' if momentum else ''}, so that steps overshoot and gradients grow "
                f"with every frame: take {SHARE * self.step_limit:.2g}, or step_size='auto'."
            )
        saddles = [
            k
            for k, v in enumerate(self.structures)
            if growing[k] and not long[k] and v.step_size is not None and v.status is Status.CONVERGED
        ]
        if saddles:
            yield (
                f"{_named(saddles)}: the spectral radius is above 1 although the step is short enough, so that this "
                "is no minimum but a saddle or a shoulder: relax to a smaller fmax, and rattle what stays there."
            )

    def _of_paths(self) -> Iterator[str]:
        grown = [k for k, v in enumerate(self.structures) if v.peak is not None and v.peak > EXPLODING]
        if grown:
            worst = max((self.structures[k] for k in grown), key=lambda v: v.peak or 0.0)
            yield (
                f"{_named(grown)}: the gradient explodes, up to {worst.peak:.1e} times on the way back to frame "
                f"{worst.peak_frame}: take a shorter step or fewer frames, or clip it, as in Replay(clip=10)."
            )
        faded = [k for k, v in enumerate(self.structures) if v.growth is not None and v.growth < FADING]
        if faded:
            least = min(self.structures[k].growth or 0.0 for k in faded)
            yield (
                f"{_named(faded)}: the gradient fades, to {least:.1e} of its length on the way back to frame "
                f"{self.structures[faded[0]].back_to}, so that the first frames, in which the basin is chosen, are "
                "hardly heard: take fewer frames, or the adjoint Guided."
            )


def health(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> Health:
    """Judge the gradient of a relaxation.

    After a backward pass it knows how the gradient grew or faded along the path (`Replay`, `Truncated`, and the first
    frames of `Guided`), and how the equations of `Implicit` were solved; before, it knows limits and radii only.

    Parameters
    ----------
    relaxation : Relaxation
        Of `relax`, of a BPTTOptimizer or of `as_relaxation`; its weights as they were when it was made.
    iterations : int
        Of the power iteration for each structure's spectral radius, each of about two force calls.
    seed : int
        Of the vectors to begin with.

    Returns
    -------
    Health

    Raises
    ------
    RuntimeError
        Where the weights were changed after the relaxation.
    """
    stepper = relaxation.trajectory.map.stepper.todict()
    return Health(tuple(measure(relaxation, iterations=iterations, seed=seed)), stepper)


def _row(k: int, v: Vitals) -> str:
    growth = "-" if v.growth is None else f"{v.growth:.1e}"
    peak = "-" if v.peak_frame is None else f"frame {v.peak_frame}"
    radius = math.nan if v.radius is None else v.radius
    half = f"{math.log(0.5) / math.log(radius):.0f}" if 0 < radius < 1 - 1e-4 else "-"
    solve = "-" if v.solve is None else v.solve.status.value
    return (
        f"{k:9}  {v.frames:6}  {v.step_limit:12.3g}  {radius:6.3f}  {half:>9}  {growth:>8}  {peak:>10}  {solve}"
    ).replace("nan", "  -")


def _meant_or_told(v: Vitals) -> bool:
    """Whether a short run was meant, its gradient going through frames, or the missing gradient tells of it."""
    short = v.status is Status.OUT_OF_STEPS
    return short and (v.back_to is not None or (v.solve is not None and v.solve.status is SolveStatus.UNRELAXED))


def _named(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:6])) + (f" and {len(members) - 6} more" if len(members) > 6 else "")
    return f"{'Structure' if len(members) == 1 else 'Structures'} {shown}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _filled(text: str, first: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False)
