"""The processes of a run, each of which does its share of the work.

`torchrun` starts them, and torch's own distributed engine connects them: gloo between hosts, nccl between GPUs. A run
of one process is a run like any other, and asks nobody.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..planning import share
from .meeting import Lost, all_there

__all__ = ["Lost", "Ranks", "leave", "together"]

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, whose relaxations may take longer than its own."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process; without all of it a process is on its own."""
Item = TypeVar("Item")
Found = TypeVar("Found")


class Ranks:
    """The processes of a run, seen from one of them.

    Whatever is asked of them must be asked by all, in the same order.

    Parameters
    ----------
    rank, size : int
        Which of them this is, and how many there are.
    store : torch.distributed.Store or None
        Where they can leave word for each other while they do not wait for each other.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of those that the ranks hold in its place."""
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

        Nothing may be asked of the ranks within `run`.
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
        """What `run` gives on one rank, the one that writes by default, or the error that it raises there, on all."""
        if self.size == 1:
            return run()
        found, error = _tried(run) if self.rank == on else (None, None)
        told = [(found, _portable(error))]
        with all_there("once"):
            dist.broadcast_object_list(told, src=on)
        found, said = told[0]
        if error or said:
            raise error or said  # type: ignore[misc]
        return found  # type: ignore[return-value]

    def shares(self, costs: Sequence[float]) -> list[list[int]]:
        """Which of the items that cost so much each rank computes: a list of their numbers for each rank, ascending."""
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
        with self._heard():
            everywhere = self.each(lambda: run(mine) if mine else [])
        found = {k: f for members, some in zip(shares, everywhere) for k, f in zip(members, some, strict=True)}
        return [found[k] for k in range(len(items))]

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What only this rank comes across, it must warn of itself."""
        ours = logging.getLogger("ase_bptt")
        level = ours.level
        if not self.writes:
            ours.setLevel(logging.WARNING)
        try:
            yield
        finally:
            ours.setLevel(level)


def together() -> Ranks:
    """The processes of this run: of a group that there is, or joined where torchrun began several.

    Ranks that do not write log errors alone, beside warnings on what is dealt to them.
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
    """Close the connections that `together` opened: who waits for this process is told so."""
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
