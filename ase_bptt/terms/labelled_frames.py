"""Frames of reference relaxations whose energies, forces and stresses can be matched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ..cells.row_maps import FRACTIONAL
from ..charges import SPECIFIED
from ..pairs import RelaxationPair

MOVED = {"positions", "numbers", "cell"}
"""Changes of a structure, as ASE names them, after which its calculator's results no longer belong to it."""


class LabelledFrames:
    """Frames of reference relaxations, evenly spaced from the first to the last, by the pair's id.

    Parameters
    ----------
    pairs : sequence of RelaxationPair
    most : int
        Frames of each.
    energies : bool
        Whether a labelled frame needs an energy, or forces alone suffice.

    Attributes
    ----------
    pairs : list of RelaxationPair
    every : dict of str to list of Atoms
    labelled : dict of str to list of Atoms
        Frames with finite labels that belong to their positions; pairs without any are not in it.

    Raises
    ------
    ValueError
        For two pairs of one name, and a frame that holds other atoms than its pair.
    """

    def __init__(self, pairs: Sequence[RelaxationPair], most: int, energies: bool = True):
        self.pairs = list(pairs)
        self.every: dict[str, list[Atoms]] = {}
        self.labelled: dict[str, list[Atoms]] = {}
        for pair in _each_once(pairs):
            frames = _frames_of(pair)
            self.every[pair.id] = evenly(frames, most)
            labelled = evenly([a for a in frames if has_labels(a, energies)], most)
            if labelled:
                self.labelled[pair.id] = labelled


def energy_of(atoms: Atoms) -> float:
    """The energy in eV of which the forces are the negative gradient, if the file holds one, else NaN."""
    results = atoms.calc.results
    return float(results.get("free_energy", results.get("energy", np.nan)))


def _each_once(pairs: Sequence[RelaxationPair]) -> list[RelaxationPair]:
    every: dict[str, RelaxationPair] = {}
    for pair in pairs:
        if every.setdefault(pair.id, pair).relaxed is not pair.relaxed:
            raise ValueError(f"Two training pairs are called {pair.id!r}: give each a name of its own.")
    return list(every.values())


def _frames_of(pair: RelaxationPair) -> list[Atoms]:
    frames = list(pair.frames) or [pair.initial, pair.relaxed]
    wrong = next((k for k, a in enumerate(frames) if not np.array_equal(a.numbers, pair.relaxed.numbers)), None)
    if wrong is not None:
        raise ValueError(
            f"{pair.id}: its frame {wrong} is {frames[wrong].symbols} and not {pair.relaxed.symbols}; "
            "give the frames of this relaxation, with their atoms in the same order."
        )
    for frame in frames:
        frame.info = {name: pair.initial.info[name] for name in SPECIFIED if name in pair.initial.info} | frame.info
    return frames


def has_labels(atoms: Atoms, energies: bool) -> bool:
    """Whether a frame has finite forces (and an energy) that belong to its positions."""
    results = getattr(atoms.calc, "results", {})
    if "forces" not in results or not np.isfinite(results["forces"]).all():
        return False
    # A calculator shared by several structures holds the results of the last one.
    moved = MOVED & {*atoms.calc.check_state(atoms)} if hasattr(atoms.calc, "check_state") else ()
    return not moved and (not energies or bool(np.isfinite(energy_of(atoms))))


def evenly(frames: Sequence[Atoms], most: int) -> list[Atoms]:
    """At most so many, the first and the last included."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    return [frames[k] for k in chosen] if len(frames) else []


def has_stress(atoms: Atoms) -> bool:
    """Whether a stress is there that the potential's can be compared with."""
    free = {type(c).__name__ for c in atoms.constraints} <= FRACTIONAL
    return bool(free and atoms.pbc.all() and np.isfinite(atoms.calc.results.get("stress", np.nan)).all())
