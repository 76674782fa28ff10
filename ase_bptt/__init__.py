"""Relax structures with machine-learning potentials, and fine-tune them through the relaxation.

Names are imported when they are first used (PEP 562): to relax costs neither the trainer nor what draws reports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import adjoints, datasets, losses, optimize, steppers, testing
    from .calculator import TorchCalculator
    from .diagnostics import diagnose
    from .evaluation import evaluate
    from .evaluation.compare import compare
    from .losses import delta_q, max_displacement, rmsd
    from .optimize.bptt_optimizer import BPTTOptimizer
    from .optimize.recording import as_relaxation
    from .pairs import RelaxationPair
    from .pairs.groups import split_by_group, split_into_folds
    from .pairs.reading import read_pairs
    from .pairs.targets import read_targets
    from .potential import Potential, Prediction
    from .potentials import load_potential, save_potential
    from .potentials.sums import SumPotential
    from .relaxation import relax
    from .result import Relaxation, Status
    from .search import search_minima
    from .structures import Structures
    from .training import Trainer

__all__ = [
    "BPTTOptimizer",
    "Potential",
    "Prediction",
    "Relaxation",
    "RelaxationPair",
    "Status",
    "Structures",
    "SumPotential",
    "TorchCalculator",
    "Trainer",
    "__version__",
    "adjoints",
    "as_relaxation",
    "compare",
    "datasets",
    "delta_q",
    "diagnose",
    "evaluate",
    "load_potential",
    "losses",
    "max_displacement",
    "optimize",
    "read_pairs",
    "read_targets",
    "relax",
    "rmsd",
    "save_potential",
    "search_minima",
    "split_by_group",
    "split_into_folds",
    "steppers",
    "testing",
]

_HOMES = {
    "calculator": ("TorchCalculator",),
    "diagnostics": ("diagnose",),
    "evaluation": ("evaluate",),
    "evaluation.compare": ("compare",),
    "losses": ("delta_q", "max_displacement", "rmsd"),
    "optimize.bptt_optimizer": ("BPTTOptimizer",),
    "optimize.recording": ("as_relaxation",),
    "pairs": ("RelaxationPair",),
    "pairs.groups": ("split_by_group", "split_into_folds"),
    "pairs.reading": ("read_pairs",),
    "pairs.targets": ("read_targets",),
    "potential": ("Potential", "Prediction"),
    "potentials": ("load_potential", "save_potential"),
    "potentials.sums": ("SumPotential",),
    "relaxation": ("relax",),
    "result": ("Relaxation", "Status"),
    "search": ("search_minima",),
    "structures": ("Structures",),
    "training": ("Trainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("adjoints", "datasets", "losses", "optimize", "steppers", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ASE knows the calculator by name in this process; it offers no registration that lasts.
from .calculator import register  # noqa: E402

register()
