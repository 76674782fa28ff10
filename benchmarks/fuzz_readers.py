"""A thousand seeded mutations of one file of each format: each is refused in a sentence, or read as it was.

    python benchmarks/fuzz_readers.py [--mutations 1000] [--formats OUTCAR ...]

A mutation cuts, flips bytes, swaps, doubles or drops blocks of lines, changes counts, puts in NaN, asterisks or huge
numbers, writes other encodings or line ends, or damages the compression. What is read must have the atoms, positions
and cells of the file as it was, for 0.002 Å. Nobody can know that a flip made one digit of another, or that whole lines
are missing where all that a file counts still agrees: these are counted by themselves. A traceback, a wait of more than
20 s or another structure is an error of ours.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from code_outputs import aims, cp2k, cp2k_steps, forces, outcar, poscar, pw, vasprun

from ase_bptt import read_pairs
from ase_bptt.pairs import InvalidPair, RelaxationPair

FORMATS = (
    "vasprun.xml", "OUTCAR", "relax.out", "aims.out", "cp2k.out", "cp2k-pos-1.xyz", "CONTCAR", "a.extxyz", "a.traj",
    "a.db", "OUTCAR.gz",
)  # fmt: skip
READ = {"cp2k-pos-1.xyz": "cp2k.out"}
"""What is read where it is another file than the one that is damaged."""
DIGITS = "0123456789.-+ eE"
LIMIT = 20
"""Seconds."""
NUMBER = re.compile(rb"-?\d+\.\d+(?:[eE][-+]?\d+)?")
COUNT = re.compile(rb"(?<![.\d])\d{1,4}(?![.\d])")


def frames() -> list[Any]:
    """A relaxation of copper with a displaced atom."""
    from ase.build import bulk

    rng = np.random.default_rng(3)
    end = bulk("Cu", cubic=True) * (2, 1, 1)
    end.positions += 0.01 * rng.normal(size=end.positions.shape)
    noise = 0.1 * rng.normal(size=end.positions.shape)
    found = [end.copy() for _ in range(3)]
    for k, frame in enumerate(found):
        frame.positions += (2 - k) / 2 * noise
        frame.calc = SinglePointCalculator(frame, energy=-3.0 * len(frame), forces=forces(found, k, 0.01))
    return found


def original(name: str, folder: Path) -> bytes:
    """The file as it was."""
    path, some = folder / name, frames()
    texts = {
        "vasprun.xml": vasprun, "OUTCAR": outcar, "OUTCAR.gz": outcar, "relax.out": pw, "aims.out": aims,
        "cp2k.out": cp2k, "cp2k-pos-1.xyz": cp2k_steps,
    }  # fmt: skip
    if name in texts:
        text = texts[name](some).encode()
        return gzip.compress(text, mtime=0) if name.endswith(".gz") else text
    if name == "CONTCAR":
        return poscar(some[-1]).encode()
    if name.endswith(".db"):
        with connect(path, use_lock_file=False) as database:
            for relaxed, atoms in ((False, some[0]), (True, some[-1])):
                database.write(atoms, relaxed=relaxed, pair="one")
    else:
        write(path, some)
    return path.read_bytes()


Mutation = Callable[[np.random.Generator, bytes], bytes]


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: rng.integers(len(data))]


def without_middle(rng: np.random.Generator, data: bytes) -> bytes:
    a, b = sorted(rng.integers(len(data), size=2))
    return data[:a] + data[b:]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    found = bytearray(data)
    for at in rng.integers(len(data), size=1 + rng.integers(4)):
        found[at] ^= 1 << rng.integers(8)
    return bytes(found)


def _blocks(rng: np.random.Generator, data: bytes, n: int) -> list[bytes]:
    lines = data.splitlines(keepends=True)
    places = sorted(rng.integers(len(lines) + 1, size=n - 1))
    return [b"".join(lines[a:b]) for a, b in zip([0, *places], [*places, len(lines)], strict=True)]


def swapped(rng: np.random.Generator, data: bytes) -> bytes:
    a, b, c, d = _blocks(rng, data, 4)
    return a + c + b + d


def doubled(rng: np.random.Generator, data: bytes) -> bytes:
    a, b, c = _blocks(rng, data, 3)
    return a + b + b + c


def without_lines(rng: np.random.Generator, data: bytes) -> bytes:
    a, _, c = _blocks(rng, data, 3)
    return a + c


def _replaced(rng: np.random.Generator, data: bytes, pattern: re.Pattern[bytes], words: tuple[bytes, ...]) -> bytes:
    found = list(pattern.finditer(data))
    if not found:
        return data + words[0]
    one = found[rng.integers(len(found))]
    return data[: one.start()] + words[rng.integers(len(words))] + data[one.end() :]


def other_count(rng: np.random.Generator, data: bytes) -> bytes:
    return _replaced(rng, data, COUNT, (b"0", b"-1", b"7", b"9", b"1000", b"99999999999", b"3.5", b"two"))


def no_number(rng: np.random.Generator, data: bytes) -> bytes:
    return _replaced(rng, data, NUMBER, (b"NaN", b"nan", b"inf", b"**********", b"-Infinity", b"", b"1.2.3"))


def huge_number(rng: np.random.Generator, data: bytes) -> bytes:
    return _replaced(rng, data, NUMBER, (b"1e300", b"-1e30", b"123456789.0", b"1" + 400 * b"0"))


def other_encoding(rng: np.random.Generator, data: bytes) -> bytes:
    text = data.decode("latin-1")
    code = ("utf-16", "utf-32", "cp037", "utf-8-sig", "utf-16-be")[rng.integers(5)]
    return text.encode(code, "replace")


def windows(rng: np.random.Generator, data: bytes) -> bytes:
    ends = (b"\r\n", b"\r", b"\n\r\n")
    return data.replace(b"\n", ends[rng.integers(3)])


def other_content(rng: np.random.Generator, data: bytes) -> bytes:
    return (b"", b"\x1f\x8b", gzip.compress(b""), gzip.compress(data)[:-9], b"\0" * 1000, rng.bytes(3000))[
        rng.integers(6)
    ]


MUTATIONS: tuple[Mutation, ...] = (
    cut, without_middle, flipped, swapped, doubled, without_lines, other_count, no_number, huge_number, other_encoding,
    windows, other_content,
)  # fmt: skip


def mutated(name: str, seed: int, data: bytes) -> tuple[str, bytes]:
    """The name of a mutation, and what it makes of a file; of a compressed one in half of the cases of its content."""
    rng = np.random.default_rng([seed, *name.encode()])
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    if name.endswith(".gz") and rng.integers(2):
        return mutation.__name__, gzip.compress(mutation(rng, gzip.decompress(data)), mtime=0)
    return mutation.__name__, mutation(rng, data)


@contextmanager
def within(seconds: int):
    """Raise TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def same(a: RelaxationPair, b: RelaxationPair) -> bool:
    """Whether two pairs have the same ends, up to lattice vectors."""
    for one, other in ((a.initial, b.initial), (a.relaxed, b.relaxed)):
        if one.symbols.get_chemical_formula("reduce") != other.symbols.get_chemical_formula("reduce"):
            return False
        if np.abs(one.cell.array - other.cell.array).max() > 2e-3:
            return False
        apart = (one.positions - other.positions) @ np.linalg.inv(one.cell.array)
        if np.abs((apart - np.rint(apart)) @ one.cell.array).max() > 2e-3:
            return False
    return True


def verdict(path: Path, truth: RelaxationPair, data: bytes, before: bytes) -> str:
    """ "refused", "read", "a digit", or what went wrong."""
    try:
        with within(LIMIT):
            pairs = read_pairs(path.with_name(READ.get(path.name, path.name)))
    except InvalidPair as problem:
        return "refused" if "\n" not in str(problem) else "WRONG: two lines"
    except TimeoutError:
        return "WRONG: hangs"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"WRONG: {type(error).__name__} in {Path(last.filename).name}"
    if len(pairs) == 1 and same(pairs[0], truth):
        return "read"
    with suppress(OSError, EOFError):
        data, before = (gzip.decompress(x) if path.suffix == ".gz" else x for x in (data, before))
    if _altered_digits(data, before, binary=path.suffix in (".traj", ".db")):
        return "altered number"
    return "other valid file" if _whole_lines(data, before) else "WRONG: another pair"


def _altered_digits(data: bytes, before: bytes, *, binary: bool) -> bool:
    """Whether digits were made others, or bytes of numbers; such files have no sum to check them by."""
    if len(data) != len(before):
        return False
    changed = [(a, b) for a, b in zip(data, before, strict=True) if a != b]
    return bool(changed) and (binary or any(chr(a) in DIGITS and chr(b) in DIGITS for a, b in changed))


def _whole_lines(data: bytes, before: bytes) -> bool:
    """Whether lines are missing, and all others were there before, but for one that was put together."""
    return len(data) < len(before) and len(set(data.splitlines()) - set(before.splitlines())) <= 1


def write_beside(name: str, folder: Path) -> None:
    """What else belongs to a file of this name."""
    beside = {"CONTCAR": "POSCAR", "cp2k.out": "cp2k-pos-1.xyz", "cp2k-pos-1.xyz": "cp2k.out"}.get(name)
    if beside is not None:
        data = poscar(frames()[0]).encode() if beside == "POSCAR" else original(beside, folder)
        (folder / beside).write_bytes(data)


def fuzz(name: str, n: int, folder: Path) -> dict[str, Counter[str]]:
    """The verdicts on so many mutations of a file of this name, by the name of the mutation."""
    before = original(name, folder)
    path, found = folder / name, dict[str, Counter[str]]()
    write_beside(name, folder)
    path.write_bytes(before)
    (truth,) = read_pairs(folder / READ.get(name, name))
    for seed in range(n):
        kind, data = mutated(name, seed, before)
        path.write_bytes(data)
        said = verdict(path, truth, data, before)
        found.setdefault(kind, Counter())[said] += 1
        if said.startswith("WRONG"):
            logging.getLogger("fuzz").error("%s, seed %d, %s: %s", name, seed, kind, said)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=1000, metavar="N")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    arguments = parser.parse_args()
    logging.getLogger("ase_bptt").setLevel(logging.ERROR)
    wrong = 0
    print(f"{'format':12} tried refused  read  altered number  other valid file  wrong")
    for name in arguments.formats:
        with tempfile.TemporaryDirectory() as folder:
            total = sum(fuzz(name, arguments.mutations, Path(folder)).values(), Counter())
        bad = sum(n for said, n in total.items() if said.startswith("WRONG"))
        unknown = f"{total['altered number']:15} {total['other valid file']:17}"
        print(f"{name:12} {sum(total.values()):5} {total['refused']:7} {total['read']:5} {unknown} {bad:6}", flush=True)
        wrong += bad
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
