"""What the tests of the shell share: calling it, what a refusal looks like, and relaxations that take milliseconds."""

import io
import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from ase import Atoms
from ase.io import write

from ase_bptt import relax, save_potential
from ase_bptt.cli import main

from .potentials import wide_lennard_jones
from .structures import wide_cluster

QUICK = ["--epochs", "1", "--steps", "2"]
KINDS = ["Ne", "Ar", "Kr", "Xe"]


def cluster_relaxation(k: int) -> list[Atoms]:
    """A rattled cluster, and where it relaxes to at sigma 2.5."""
    start = wide_cluster(k)
    start.symbols[:] = KINDS[k % len(KINDS)]
    with torch.no_grad():
        end = relax(wide_lennard_jones(2.5), start, fmax=1e-3, steps=300).to_atoms()
    end.info |= {"id": f"cluster {k}", "kind": f"kind {k % 3}"}
    return [start, end]


def write_relaxations(folder) -> None:
    """A folder of relaxations, the same as two files, and a potential that wants tuning."""
    relaxations = [cluster_relaxation(k) for k in range(5)]
    (folder / "pairs").mkdir()
    for k, frames in enumerate(relaxations):
        write(folder / "pairs" / f"{k}.extxyz", frames)
    write(folder / "initial.extxyz", [frames[0] for frames in relaxations])
    write(folder / "relaxed.extxyz", [frames[-1] for frames in relaxations])
    save_potential(wide_lennard_jones(2.65), folder / "lj")


def run(*arguments) -> tuple[int, str, str]:
    """Exit code, standard output, standard error with what is logged."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), _logged_to(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@contextmanager
def _logged_to(stream):
    """As the shell sets logging up: pytest's own handlers keep it from that."""
    root, ours = logging.getLogger(), logging.getLogger("ase_bptt")
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(logging.NOTSET)


def is_refused(result, *texts) -> None:
    """One sentence on standard error, nothing on standard output."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("ase-bptt: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for text in texts:
        assert text in err


def is_one_sentence(error) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 400


def drawn(self, target, **_):
    """In the place of Figure.savefig: a picture takes longer to draw than all else in a short run."""
    if hasattr(target, "write"):
        target.write(b"a picture")
    else:
        Path(target).write_bytes(b"a picture")
