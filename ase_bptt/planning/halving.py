"""Going on with smaller batches where memory has run out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
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
        Where a single item does not fit, naming the mend.
    """
    waiting = [list(items)] if len(items) else []
    while waiting:
        part = waiting.pop()
        found = _tried(run, part)
        if found is not None:
            yield part, found[0]
            continue
        if len(part) == 1:
            raise MemoryError(
                "Memory ran out on a single structure: use a device with more memory, a smaller potential, or an "
                "adjoint that keeps less, such as 'replay' or 'implicit'."
            )
        log.warning("Memory ran out on %d structures at once: going on with half as many.", len(part))
        half = (len(part) + 1) // 2
        waiting += [part[half:], part[:half]]


def _tried(run: Callable[[list[Item]], Found], part: list[Item]) -> tuple[Found] | None:
    """None where memory ran out; by then everything that the error held on to is given back."""
    try:
        return (run(part),)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
