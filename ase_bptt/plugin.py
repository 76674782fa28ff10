"""What ASE is told of this package when it is imported."""

from __future__ import annotations

from ase.calculators.calculator import external_calculators, register_calculator_class

from .calculator import TorchCalculator

NAME = "torchcalculator"
"""For `ase.calculators.calculator.get_calculator_class` and ``ase run``."""


def register() -> None:
    """Make TorchCalculator known to ASE by name, in this process; ASE has no way to be told once and for all."""
    if NAME not in external_calculators:
        register_calculator_class(NAME, TorchCalculator)
