"""What a potential keeps while it learns: further terms of the loss, and the before-and-after card."""

from __future__ import annotations

from .card import Card, card
from .terms import Pull, Reference, Teacher, Term

__all__ = ["Card", "Pull", "Reference", "Teacher", "Term", "card"]
