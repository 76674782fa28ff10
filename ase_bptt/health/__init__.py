"""Whether the gradient of a relaxation is to be trusted: stability limit, spectral radius, adjoint norms, alarms."""

from __future__ import annotations

from .report import Health, health
from .spectrum import spectral_radius
from .vitals import Vitals

__all__ = ["Health", "Vitals", "health", "spectral_radius"]
