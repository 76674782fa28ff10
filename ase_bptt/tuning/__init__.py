"""Which weights are trained: by name, by layer, at rates of their own, or by low-rank updates beside them."""

from __future__ import annotations

from .trainable import groups, prepare, select

__all__ = ["groups", "prepare", "select"]
