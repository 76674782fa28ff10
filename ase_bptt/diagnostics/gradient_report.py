"""Whether the gradient of a relaxation can be trusted: gradient diagnostics of a batch, with alarms and as text."""

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
from .gradients import ITERATIONS, GradientDiagnostics, of_structures

EXPLODING = 1e3
"""A gradient that grows by more than this is dominated by few frames."""
VANISHING = 1e-3
"""A gradient that falls below this share of its norm says almost nothing about the first frames."""
UNSTABLE = 1e-3
"""A spectral radius above 1 by less may be due to rounding, or to forces that have not quite vanished."""
ROWS = 20
"""Structures with a line of their own in the text."""
WIDTH = 80


@dataclass(frozen=True)
class GradientReport:
    """Gradient diagnostics of a batch, as `diagnose_gradients` returns them.

    Attributes
    ----------
    structures : tuple of GradientDiagnostics
    stepper : dict
        Name and hyperparameters of the stepper.
    """

    structures: tuple[GradientDiagnostics, ...]
    stepper: dict[str, Any]

    @property
    def step_limit(self) -> float:
        """The smallest 2/lambda_max in Å^2/eV of all structures; infinite where no eigenvalue is positive."""
        return min((d.step_limit for d in self.structures if not math.isnan(d.step_limit)), default=math.nan)

    @property
    def alarms(self) -> tuple[str, ...]:
        """What is wrong and what to do about it, a sentence or two each; empty where nothing is wrong."""
        return (*self._of_ends(), *self._of_solves(), *self._of_steps(), *self._of_growths())

    def todict(self) -> dict[str, Any]:
        """As JSON; None for what is missing or not finite."""
        found = {
            "stepper": self.stepper,
            "step_limit": self.step_limit,
            "alarms": self.alarms,
            "structures": [d.todict() for d in self.structures],
        }
        return without_nan(found)

    def to_json(self) -> str:
        """`todict` as text."""
        return json.dumps(self.todict(), indent=1, allow_nan=False)

    def text(self) -> str:
        """At most 80 columns wide: a line for each structure, then the alarms."""
        values = ", ".join(f"{k} {_short(v)}" for k, v in self.stepper.items() if k != "name")
        title = f"Gradient diagnostics (structures: {len(self.structures)}; {self.stepper['name']}: {values})"
        lines = [_filled(title, "")]
        lines.append("structure  frames  2/lambda_max  radius  halves in    growth  largest at  solve")
        lines += [_row(k, d) for k, d in enumerate(self.structures[:ROWS])]
        if len(self.structures) > ROWS:
            lines.append(f"  and {len(self.structures) - ROWS} more")
        lines += [_filled(alarm, "! ") for alarm in self.alarms] or ["No alarm."]
        return "\n".join(lines)

    def _of_ends(self) -> Iterator[str]:
        for status in (Status.DIVERGED, Status.OUT_OF_STEPS):
            members = [k for k, d in enumerate(self.structures) if d.status is status and not _expected(d)]
            if members:
                yield f"{_named(members)}: not relaxed ({status.value}). {status.sentence}"

    def _of_solves(self) -> Iterator[str]:
        for status in (SolveStatus.UNRELAXED, SolveStatus.SADDLE, SolveStatus.OUT_OF_ITERATIONS):
            members = [k for k, d in enumerate(self.structures) if d.solve and d.solve.status is status]
            if status is SolveStatus.UNRELAXED:
                members = [k for k in members if self.structures[k].status is Status.OUT_OF_STEPS]
            if members:
                yield f"{_named(members)}: the implicit gradient is unsolved ({status.value}). {status.sentence}"

    def _of_steps(self) -> Iterator[str]:
        momentum = self.stepper.get("momentum", 0.0)
        bounds = [(1 + momentum) * d.step_limit for d in self.structures]
        growing = [d.radius is not None and d.radius > 1 + UNSTABLE for d in self.structures]
        long = [d.step_size is not None and d.step_size > b for d, b in zip(self.structures, bounds, strict=True)]
        if isinstance(self.stepper.get("step_size"), dict):
            # The longest step may be that of an element whose bonds are soft.
            long = [a and b for a, b in zip(long, growing, strict=True)]
        too_long = [k for k, is_long in enumerate(long) if is_long]
        if too_long:
            least = min(bounds[k] for k in too_long)
            yield (
                f"{_named(too_long)}: the step size is above the stability limit of {least:.3g} Å^2/eV"
                f"{f' with momentum {momentum:g}' if momentum else ''}, so that steps overshoot and gradients grow "
                f"with every frame: use {SHARE * self.step_limit:.2g}, or step_size='auto'."
            )
        saddles = [
            k
            for k, d in enumerate(self.structures)
            if growing[k] and not long[k] and d.step_size is not None and d.status is Status.CONVERGED
        ]
        if saddles:
            yield (
                f"{_named(saddles)}: the spectral radius is above 1 although the step size is below the limit, so that "
                "this is no minimum but a saddle or a shoulder: relax to a smaller fmax, and rattle what stays there."
            )

    def _of_growths(self) -> Iterator[str]:
        exploding = [k for k, d in enumerate(self.structures) if d.peak is not None and d.peak > EXPLODING]
        if exploding:
            worst = max((self.structures[k] for k in exploding), key=lambda d: d.peak or 0.0)
            yield (
                f"{_named(exploding)}: the gradient explodes, by a factor of up to {worst.peak:.1e} at frame "
                f"{worst.peak_frame}: use a shorter step or fewer frames, or clip it, as in Replay(clip=10)."
            )
        vanishing = [k for k, d in enumerate(self.structures) if d.growth is not None and d.growth < VANISHING]
        if vanishing:
            least = min(self.structures[k].growth or 0.0 for k in vanishing)
            yield (
                f"{_named(vanishing)}: the gradient vanishes, by a factor of {least:.1e} back to frame "
                f"{self.structures[vanishing[0]].back_to}, so that it says almost nothing about the first frames, in "
                "which the basin is selected: use fewer frames, or the adjoint Guided."
            )


def diagnose_gradients(relaxation: Relaxation, *, iterations: int = ITERATIONS, seed: int = 0) -> GradientReport:
    """Diagnose the gradient of a relaxation.

    After a backward pass the report contains the growth of the gradient along the path (`Replay`, `Truncated`, and the
    first frames of `Guided`) and how the equations of `Implicit` were solved; before, stability limits and spectral
    radii only.

    Parameters
    ----------
    relaxation : Relaxation
        Of `relax`, of a BPTTOptimizer or of `as_relaxation`, with unchanged weights.
    iterations : int
        Of the power iteration for each structure's spectral radius, each of about two force calls.
    seed : int
        Of the initial vectors.

    Returns
    -------
    GradientReport

    Raises
    ------
    RuntimeError
        Where the weights were changed after the relaxation.

    Examples
    --------
    >>> from ase.build import molecule
    >>> from ase_bptt import load_potential, relax
    >>> from ase_bptt.diagnostics.gradient_report import diagnose_gradients
    >>> relaxation = relax(load_potential("morse"), molecule("N2"), stepper="gd", steps=5)
    >>> relaxation.positions.diff(dim=0).norm().backward()
    >>> print(diagnose_gradients(relaxation).text().splitlines()[0])
    Gradient diagnostics (structures: 1; gd: step_size 0.05, anneal 1, momentum 0,
    """
    stepper = relaxation.trajectory.map.stepper.todict()
    return GradientReport(tuple(of_structures(relaxation, iterations=iterations, seed=seed)), stepper)


def _row(k: int, d: GradientDiagnostics) -> str:
    growth = "-" if d.growth is None else f"{d.growth:.1e}"
    peak = "-" if d.peak_frame is None else f"frame {d.peak_frame}"
    radius = math.nan if d.radius is None else d.radius
    half = f"{math.log(0.5) / math.log(radius):.0f}" if 0 < radius < 1 - 1e-4 else "-"
    solve = "-" if d.solve is None else d.solve.status.value
    return (
        f"{k:9}  {d.frames:6}  {d.step_limit:12.3g}  {radius:6.3f}  {half:>9}  {growth:>8}  {peak:>10}  {solve}"
    ).replace("nan", "  -")


def _expected(d: GradientDiagnostics) -> bool:
    """Whether a run out of steps needs no alarm: its gradient runs through frames, or another alarm reports it."""
    out = d.status is Status.OUT_OF_STEPS
    return out and (d.back_to is not None or (d.solve is not None and d.solve.status is SolveStatus.UNRELAXED))


def _named(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:6])) + (f" and {len(members) - 6} more" if len(members) > 6 else "")
    return f"{'Structure' if len(members) == 1 else 'Structures'} {shown}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _filled(text: str, first: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False)
