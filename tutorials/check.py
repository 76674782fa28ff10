"""Run the tutorials and compare what they print with what stands in tutorials/expected.

    python tutorials/check.py [01_drop_in 02_fine_tune ...]

Each script runs in an empty temporary folder, on one thread, with the warnings that ase_bptt causes as
errors. Expected output may hold "..." where a number depends on the machine (seconds, memory), and
white space does not count. Prints one line a tutorial; exits 1 with a diff where one differs.
"""

from __future__ import annotations

import argparse
import doctest
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# The option -W takes the name of one module only; the filter takes all whose names begin so.
RUN = (
    "import runpy, sys, warnings; "
    "warnings.filterwarnings('error', module='ase_bptt'); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
SECONDS = 240
"""A tutorial that takes longer is stopped: twice what it may take on two quiet cores."""


def names() -> list[str]:
    """All tutorials, in order."""
    return sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))


def check(name: str) -> str:
    """Run one tutorial; what is wrong with it, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-c", RUN, str(HERE / f"{name}.py")]
        try:
            run = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"It was stopped after {SECONDS} s."
    if run.returncode:
        return f"It ended with {run.returncode}.\n{run.stdout}{run.stderr}"
    want = (HERE / "expected" / f"{name}.txt").read_text(encoding="utf-8")
    checker = doctest.OutputChecker()
    if checker.check_output(want, run.stdout, FLAGS):
        return ""
    return checker.output_difference(doctest.Example("", want), run.stdout, FLAGS | doctest.REPORT_UDIFF)


def main() -> int:
    """Check the tutorials that are named, or all; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *names()], help=", ".join(names()))
    failed = False
    for name in parser.parse_args().names or names():
        began = time.monotonic()
        problem = check(name)
        print(f"{name}: {'differs' if problem else 'as expected'}, {time.monotonic() - began:.0f} s", flush=True)
        if problem:
            print(problem, flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
