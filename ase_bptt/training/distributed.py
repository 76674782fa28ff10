"""The processes of one run: how they share work and state, and what happens when one of them is lost."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..throughput.packing import share

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, whose relaxations may take longer than its own."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process; without all of it a process is on its own."""
UNLIKE = (
    "The processes of this run were given unlike settings or pairs, or do not all continue from the same epoch: build "
    "or resume the Trainer alike on each."
)
Item = TypeVar("Item")
Found = TypeVar("Found")


class Ranks:
    """The processes of a run, seen from one of them.

    All of them must call the same methods in the same order.

    Parameters
    ----------
    rank, size : int
        The number of this process, and how many there are.
    store : torch.distributed.Store or None
        Where they can leave messages for each other without waiting.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def writes(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size == 1:
            return
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
            alike = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.detach().reshape(-1) for t in alike])
            with all_there("sum"):
                dist.all_reduce(flat)
            with torch.no_grad():
                for tensor, total in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(total.view_as(tensor))

    def each(self, run: Callable[[], Found]) -> list[Found]:
        """What `run` gives on each rank, in their order; an error on one is raised on all.

        `run` may call no method of the ranks.
        """
        if self.size == 1:
            return [run()]
        found, error = _tried(run)
        everywhere: list[Any] = [None] * self.size
        with all_there("each"):
            dist.all_gather_object(everywhere, (found, _portable(error)))
        for failed in (error, *(e for _, e in everywhere)):
            if failed is not None:
                raise failed
        return [found for found, _ in everywhere]

    def once(self, run: Callable[[], Found], on: int = 0) -> Found:
        """What `run` gives on one rank, 0 by default, on all of them; an error there is raised on all."""
        if self.size == 1:
            return run()
        found, error = _tried(run) if self.rank == on else (None, None)
        sent = [(found, _portable(error))]
        with all_there("once"):
            dist.broadcast_object_list(sent, src=on)
        found, received = sent[0]
        if error or received:
            raise error or received  # type: ignore[misc]
        return found  # type: ignore[return-value]

    def require_equal(self, run: Callable[[], Any]) -> None:
        """Raise ValueError on all ranks where `run` gives one of them something else than another."""
        first, *others = self.each(run)
        if any(other != first for other in others):
            raise ValueError(UNLIKE)

    def shared_state(self, state: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The state of rank 0, of tensors and plain values, on all ranks; its tensors are on the host."""

        def packed() -> bytes:
            file = io.BytesIO()
            torch.save(dict(state()), file)
            return file.getvalue()

        file = io.BytesIO(self.once(packed))
        found: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        return found

    def shares(self, costs: Sequence[float]) -> list[list[int]]:
        """The indices, ascending, of the items that each rank computes, by their costs."""
        return share(costs, self.size)

    def dealt(
        self, items: Sequence[Item], costs: Sequence[float], run: Callable[[list[Item]], Sequence[Found]]
    ) -> list[Found]:
        """What `run` gives for the items, in their order; each rank runs it on its share, by `shares`.

        Parameters
        ----------
        items : sequence
        costs : sequence of float
            By which they are dealt out.
        run : callable
            ``run(items)`` gives something for each; it is not called where there are none.
        """
        shares = self.shares(costs)
        mine = [items[k] for k in shares[self.rank]]
        with self.warnings_of_all_ranks():
            everywhere = self.each(lambda: run(mine) if mine else [])
        found = {k: f for members, some in zip(shares, everywhere) for k, f in zip(members, some, strict=True)}
        return [found[k] for k in range(len(items))]

    @contextmanager
    def warnings_of_all_ranks(self) -> Iterator[None]:
        """Let every rank log warnings: the others do not see what it finds in its share."""
        ours = logging.getLogger("ase_bptt")
        level = ours.level
        if not self.writes:
            ours.setLevel(logging.WARNING)
        try:
            yield
        finally:
            ours.setLevel(level)


def together() -> Ranks:
    """The processes of this run: those of the process group, which is joined first where torchrun started several.

    Other ranks than 0 log errors alone, and warnings on their share of the work.
    """
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized() and all(os.environ.get(name) for name in ENVIRONMENT):
        _join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if not dist.is_initialized():
        return Ranks()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), _joined[0] if _joined else None)
    if not ranks.writes:
        logging.getLogger("ase_bptt").setLevel(logging.ERROR)
    return ranks


def leave() -> None:
    """Close the connections that `together` opened, which ends the waiting of other processes for this one."""
    if _joined:
        _joined.clear()
        # What still refers to the connections would keep them open.
        gc.collect()
        dist.destroy_process_group()


_joined: list[dist.Store] = []


def _join(rank: int, size: int) -> None:
    if size == 1:
        return
    store, *_ = next(dist.rendezvous("env://", rank, size))
    backend = "gloo"
    if torch.cuda.is_available():
        devices, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % devices)
        # nccl refuses two processes on one GPU.
        backend = "cpu:gloo,cuda:nccl" if here <= devices and dist.is_nccl_available() else "cpu:gloo,cuda:gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=PATIENCE
    )
    _joined.append(dist.PrefixStore("word", store))
    atexit.register(leave)


def _tried(run: Callable[[], Found]) -> tuple[Found | None, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error as another process can read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


OPERATIONS = ("sum", "each", "once")
"""What the processes of a run do together."""
GLANCE = 5e-4
"""Seconds between two looks whether all are there."""
UNREACHABLE = ("gloo/transport", "connect", "timed out", "timeout")
"""In what gloo says where it cannot reach another process; it has no class of its own for it."""


class Lost(RuntimeError):
    """Another process of the run has died, or is out of reach."""


@contextmanager
def all_there(operation: str) -> Iterator[None]:
    """Wait until all ranks are here, and react to signals meanwhile, which torch's own waiting does not.

    Parameters
    ----------
    operation : str
        One of `OPERATIONS`, which they are about to do.

    Raises
    ------
    Lost
        Where one cannot be reached, now or during the operation.
    ValueError
        Where they are about to do different operations, for which they would wait for ever.
    """
    here = torch.zeros(len(OPERATIONS), device="cpu" if "cpu:" in dist.get_backend_config() else "cuda")
    here[OPERATIONS.index(operation)] = 1
    try:
        met = dist.all_reduce(here, async_op=True)
        while not met.is_completed():
            time.sleep(GLANCE)
        met.wait()
        if here.count_nonzero() > 1:
            raise ValueError(UNLIKE)
        yield
    except RuntimeError as error:
        if not _unreachable(error):
            raise
        raise Lost("Another process of the run has died or is out of reach.") from error


def _unreachable(error: RuntimeError) -> bool:
    # Memory that ran out has an error class of its own; what has none is recognised by its message.
    if isinstance(error, dist.DistError) or type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    return any(word in str(error).lower() for word in UNREACHABLE)
