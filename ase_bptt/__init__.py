"""Relax structures with machine-learning potentials, and fine-tune them through the relaxation."""

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
from .plugin import register
from .potential import Potential, Prediction
from .reading import read_pairs
from .recording import as_relaxation
from .relaxation import relax
from .result import Relaxation, Status
from .structures import Structures
from .training.trainer import Trainer
from .version import __version__

register()

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
