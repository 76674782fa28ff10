"""Which structures are computed together, and where: by what each of them costs."""

from .halving import in_parts, ran_out
from .packing import pack, share

__all__ = ["in_parts", "pack", "ran_out", "share"]
