"""Whether training through the relaxation can help a potential on given pairs, measured before any training."""

from .measure import Diagnosis, diagnose, spread

__all__ = ["Diagnosis", "diagnose", "spread"]
