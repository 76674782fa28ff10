"""Embedded data: the default potential and the silicon defect relaxations."""
