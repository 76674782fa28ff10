"""Relax structures with machine-learning potentials, and fine-tune them through the relaxation."""

__version__ = "0.1.0"

from . import adjoints, steppers
from .calculator import TorchCalculator
from .loading import load_potential, save_potential
from .optimizer import BPTTOptimizer
from .potential import Potential, Prediction
from .relaxation import Relaxation, Status, relax
from .structures import Structures

__all__ = [
    "BPTTOptimizer",
    "Potential",
    "Prediction",
    "Relaxation",
    "Status",
    "Structures",
    "TorchCalculator",
    "adjoints",
    "load_potential",
    "relax",
    "save_potential",
    "steppers",
]
