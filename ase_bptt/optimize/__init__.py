"""ASE's optimizers by their own names and signatures: a script keeps its algorithm when its import is swapped.

``from ase_bptt.optimize import FIRE`` instead of ``from ase.optimize import FIRE``. The positions are ASE's; beyond
them, a restart takes the path of an uninterrupted run, forces that are not finite end a run with a sentence, and a run
of FIRE can be differentiated (`BPTTOptimizer.relaxation`).
"""

from __future__ import annotations

from .fire import FIRE
from .line_search import BFGSLineSearch
from .quasi_newton import BFGS, LBFGS

__all__ = ["BFGS", "FIRE", "LBFGS", "BFGSLineSearch", "QuasiNewton"]

QuasiNewton = BFGSLineSearch
