"""Which structures are computed together, and where: by what each of them costs."""

from .footprint import Footprint, Size
from .halving import fits, in_parts, ran_out, tell
from .live import peak_bytes
from .packing import pack, share
from .planner import Planner

__all__ = ["Footprint", "Planner", "Size", "fits", "in_parts", "pack", "peak_bytes", "ran_out", "share", "tell"]
