"""Shared helpers: files written whole or not at all, checks of numbers, gradients of which some may be None."""

from __future__ import annotations

import errno
import json
import math
import operator
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Any)
UNFINISHED = ".*.part.*"
"""Pattern of the temporary names, for removing what a killed run has left."""
REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})
UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What is raised on reading a file that is damaged or of another format."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside this one, of the same ending, which takes its place if the block ends well.

    Where the block makes a folder of it, its files take their places one after another.

    Raises
    ------
    OSError
        Where the disk is full or the place is not writable, naming the file; what was there is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        places = {temporary: path}
        if temporary.is_dir():
            path.mkdir(exist_ok=True)
            places = {part: path / part.name for part in temporary.iterdir()}
        for part in places:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        for part, place in places.items():
            os.replace(part, place)
    except (OSError, RuntimeError) as error:
        if not _refused(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise OSError(
            f"{path} could not be written ({reason}): make room there or choose another place; "
            "what was there before is untouched."
        ) from error
    finally:
        # A place that cannot be written may refuse this, too, and has been reported already.
        with suppress(OSError):
            discard(temporary)


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Make a folder, and raise OSError, naming it, where files cannot be written into it."""
    folder = Path(folder)
    probe = folder / f".{os.getpid()}.part.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
    except OSError as error:
        raise OSError(f"Nothing can be written into {folder} ({error.strerror}): choose another place.") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write JSON that any tool reads: null for a number that is not finite."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(without_nan(found), indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same with None for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_short(error: Exception) -> str:
    """The error's name and the first line of its message, which torch follows by many."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _refused(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError):
        return error.errno in REFUSED
    # torch.save reports a full disk by a RuntimeError from the C++ code that writes archives.
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream error"))


def best_device() -> torch.device:
    """The GPU where PyTorch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that is here; None is the GPU where PyTorch finds one, else the CPU.

    Raises
    ------
    ValueError
        For a device that is not here, with what to do.
    """
    if device is None:
        return best_device()
    try:
        found = torch.empty(0, device=device).device
        if found.type != "meta":  # torch takes this one, too, but it holds no numbers
            return found
    except (RuntimeError, AssertionError):
        pass
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {0: "PyTorch finds no GPU", 1: "PyTorch finds one GPU, cuda:0"}
    raise ValueError(
        f"There is no device {str(device)!r} here: {there.get(gpus, f'PyTorch finds {gpus} GPUs, cuda:0 and so on')}; "
        "leave it out to take the best that is here, take 'cpu', or install a PyTorch that fits your GPU (pytorch.org)."
    )


def counted(n: int, noun: str) -> str:
    """A number of things, for messages.

    >>> counted(1, "frame"), counted(2, "frame")
    ('1 frame', '2 frames')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for a number that is given and not positive, or not finite; None is not given."""
    for name, given in numbers.items():
        value = given.item() if hasattr(given, "item") else given
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value:g}.")


def check_count(**numbers: Any) -> None:
    """Raise ValueError for a number that is given and not whole, or below 1; None is not given."""
    for name, given in numbers.items():
        try:
            good = given is None or operator.index(given) >= 1
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"{name} must be a whole number, at least 1, got {given}.")


@contextmanager
def autograd_enabled(enabled: bool = True) -> Iterator[None]:
    """Have autograd record, or not, whatever mode the caller is in: under inference mode nothing is ever recorded."""
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


def outside_inference_mode(function: F) -> F:
    """A function that leaves torch's inference mode where it is called under it, and records nothing then.

    What it makes and keeps can be used after the caller's block, which tensors of inference mode cannot.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with autograd_enabled(False):
            return function(*args, **kwargs)

    return cast(F, wrapped)


def lasting_property(function: Callable[[Any], T]) -> cached_property[T]:
    """A cached property that is no tensor of inference mode, whoever asks for it first."""
    return cached_property(torch.inference_mode(False)(function))


def savable(value: T) -> T:
    """The same dataclass with copies of the tensors that were made under inference mode: autograd cannot save those."""
    made = {field.name: getattr(value, field.name) for field in fields(value)}
    copies = {name: t.clone() for name, t in made.items() if isinstance(t, Tensor) and t.is_inference()}
    return replace(value, **copies) if copies else value


Gradients = Sequence[Tensor | None]


def vjp(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients by the inputs; None for those that no output depends on."""
    live = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    if not live:
        return [None] * len(inputs)
    outs, grads = zip(*live, strict=True)
    return list(torch.autograd.grad(outs, list(inputs), grads, allow_unused=True))


def added(some: Gradients, others: Gradients) -> list[Tensor | None]:
    """The sum of two gradients, in either of which some may be None."""
    return [a if b is None else b if a is None else a + b for a, b in zip(some, others, strict=True)]


def safe_sqrt(square: Tensor) -> Tensor:
    """sqrt with gradient zero at zero."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), torch.zeros_like(square))


def unrounded(positions: Tensor, given: np.ndarray) -> np.ndarray:
    """Positions (Å) as float64, with the digits of those given that the precision of a potential had rounded away.

    What has not moved is where it was, to the last bit; what is in double precision already stays as it is.

    Parameters
    ----------
    positions : Tensor, shape (n_atoms, 3)
    given : array of float64, shape (n_atoms, 3)
        What they were, or are, before they were rounded.
    """
    exact = torch.from_numpy(np.array(given, dtype=float))
    rounded = exact.to(positions.dtype).double()
    return (positions.detach().cpu().double() + (exact - rounded)).numpy()


def differs(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> bool:
    """Whether anything of the module would have to be cast or moved."""
    floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return any(
        (dtype is not None and t.dtype != dtype)
        or (device is not None and t.device != torch.empty(0, device=device).device)
        for t in floats
    )
