"""Which structures are computed together, and where: by what each of them costs."""

from .halving import fits, in_parts, ran_out, tell
from .packing import pack, share

__all__ = ["fits", "in_parts", "pack", "ran_out", "share", "tell"]
