"""python -m ase_bptt is ase-bptt."""

import sys

from .cli import main

sys.exit(main())
