"""Relax structures with machine-learning potentials, and fine-tune them through the relaxation.

Names are imported when they are first used (PEP 562): to relax costs neither the trainer nor what draws reports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .plugin import register

if TYPE_CHECKING:
    from . import adjoints, datasets, losses, optimize, steppers, testing
    from .calculator import TorchCalculator
    from .comparison import compare
    from .diagnosis import diagnose
    from .evaluation import evaluate
    from .groups import split_by_group, split_into_folds
    from .loading import load_potential, save_potential
    from .losses import delta_q, max_displacement, rmsd
    from .optimizer import BPTTOptimizer
    from .pairs import RelaxationPair
    from .potential import Potential, Prediction
    from .reading import read_pairs
    from .recording import as_relaxation
    from .relaxation import relax
    from .result import Relaxation, Status
    from .structures import Structures
    from .training.trainer import Trainer
    from .version import __version__

_HOMES = {
    "calculator": ("TorchCalculator",),
    "comparison": ("compare",),
    "diagnosis": ("diagnose",),
    "evaluation": ("evaluate",),
    "groups": ("split_by_group", "split_into_folds"),
    "loading": ("load_potential", "save_potential"),
    "losses": ("delta_q", "max_displacement", "rmsd"),
    "optimizer": ("BPTTOptimizer",),
    "pairs": ("RelaxationPair",),
    "potential": ("Potential", "Prediction"),
    "reading": ("read_pairs",),
    "recording": ("as_relaxation",),
    "relaxation": ("relax",),
    "result": ("Relaxation", "Status"),
    "structures": ("Structures",),
    "training.trainer": ("Trainer",),
    "version": ("__version__",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("adjoints", "datasets", "losses", "optimize", "steppers", "testing")

__all__ = [
    "BPTTOptimizer",
    "Potential",
    "Prediction",
    "Relaxation",
    "RelaxationPair",
    "Status",
    "Structures",
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
    "relax",
    "rmsd",
    "save_potential",
    "split_by_group",
    "split_into_folds",
    "steppers",
    "testing",
]

register()


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
