"""Going on with smaller batches where memory has run out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
SIGNS = ("can't allocate memory", "out of memory", "OutOfMemoryError", "ALLOC_FAILED")
Item = TypeVar("Item")
Found = TypeVar("Found")


def in_parts(run: Callable[[list[Item]], Found], items: Sequence[Item]) -> Iterator[tuple[list[Item], Found]]:
    """What `run` gives for the items, all at once or, where memory runs out, for one half after the other.

    Parameters
    ----------
    run : callable
        ``run(items)``; where it fails it must leave nothing behind, for its halves are run instead.
    items : sequence

    Yields
    ------
    (list, object)
        Each part of the items, in order, and what was found for it.

    Raises
    ------
    MemoryError
        Where a single item does not fit.
    """
    waiting = [list(items)] if len(items) else []
    while waiting:
        part = waiting.pop()
        found = fits(partial(run, part))
        if found is not None:
            yield part, found[0]
            continue
        tell(len(part))
        half = (len(part) + 1) // 2
        waiting += [part[half:], part[:half]]


def fits(run: Callable[[], Found]) -> tuple[Found] | None:
    """What `run` gives; None where memory ran out, and by then everything that it held on to is given back."""
    try:
        return (run(),)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def tell(n: int) -> None:
    """Warn that so many structures were too many.

    Raises
    ------
    MemoryError
        Where it was a single one, naming the mend.
    """
    if n == 1:
        raise MemoryError(
            "Memory ran out on a single structure: use a device with more memory, a smaller potential, or an "
            "adjoint that keeps less, such as 'replay' or 'implicit'."
        )
    log.warning("Memory ran out on %d structures at once: going on with half as many.", n)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator has no class of its own for it, and TorchScript passes errors on as text.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
