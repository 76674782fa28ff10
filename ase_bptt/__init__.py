"""Relax structures with machine-learning potentials, and fine-tune them through the relaxation."""

__version__ = "0.1.0"
