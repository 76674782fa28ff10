"""Run ASE's tutorials, each with ASE's classes and with those of ase_bptt, and compare their numbers.

    python tutorials/ase/check.py [nitrogen_on_copper silver_cluster ...]

On one thread, with the warnings that ase_bptt causes as errors. Prints one line a tutorial; exits 1, with
what the tutorial printed, where a number differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """All tutorials."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("check", "twice"))


def check(name: str) -> tuple[bool, str]:
    """Run one tutorial; whether it ended well, and what it printed."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.filterwarnings("error", module="ase_bptt")
        try:
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        except Exception:
            return False, printed.getvalue() + traceback.format_exc()
    return True, printed.getvalue()


def main() -> int:
    """Check the tutorials that are named, or all; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *names()], help=", ".join(names()))
    torch.set_num_threads(1)
    failed = False
    for name in parser.parse_args().names or names():
        began = time.monotonic()
        passed, printed = check(name)
        found = printed.splitlines()[-1] if passed else "differs"
        print(f"{name}: {found}, {time.monotonic() - began:.1f} s", flush=True)
        if not passed:
            print(printed, flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
