"""python -m ase_bptt is ase-bptt."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
