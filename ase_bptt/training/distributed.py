"""The processes of one run: which work each does, that all begin alike, and what happens when one is lost."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..throughput.packing import share
from . import checkpoint as resuming

if TYPE_CHECKING:
    from .trainer import Trainer

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


ASKED = ("sum", "each", "once")
"""What the processes of a run do together."""
GLANCE = 5e-4
"""Seconds between two looks whether all are there."""
UNREACHABLE = ("gloo/transport", "connect", "timed out", "timeout")
"""In what gloo says where it cannot reach another process; it has no class of its own for it."""
UNLIKE = (
    "The processes of this run were given unlike settings or pairs, or do not all go on from the same epoch: build or "
    "resume the Trainer alike on each."
)


class Lost(RuntimeError):
    """Another process of the run has died, or is out of reach."""


@contextmanager
def all_there(asked: str) -> Iterator[None]:
    """Wait until all ranks are here, as a process that hears signals: in torch's own waiting it would be deaf.

    Parameters
    ----------
    asked : str
        One of `ASKED`, which they are about to do.

    Raises
    ------
    Lost
        Where one cannot be reached, now or while they do it.
    ValueError
        Where they are about to do unlike things, for which they would wait without end.
    """
    here = torch.zeros(len(ASKED), device="cpu" if "cpu:" in dist.get_backend_config() else "cuda")
    here[ASKED.index(asked)] = 1
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
    # Memory that ran out has a class of its own; what has none is told by its words.
    if isinstance(error, dist.DistError) or type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    return any(word in str(error).lower() for word in UNREACHABLE)


def align(trainer: Trainer) -> None:
    """Take over weights, numbers of the stepper, optimizer and order from the rank that writes.

    Raises
    ------
    ValueError
        Where the ranks were given other settings or other pairs, or stand at unlike epochs.
    """
    ranks = trainer.ranks
    if ranks.size == 1:
        return
    told = ranks.each(lambda: (resuming.settings(trainer), trainer.data, trainer.epoch))
    if any(other != told[0] for other in told):
        raise ValueError(UNLIKE)
    # On the host, whatever device each of them has.
    state = torch.load(io.BytesIO(ranks.once(lambda: _packed(trainer))), weights_only=True, map_location="cpu")
    trainer.potential.load_state_dict(state["potential"])
    trainer.stepper.load_state_dict(state["stepper"])
    trainer.updates.load(state["updates"])
    trainer.order.generator.set_state(state["generator"])


def _packed(trainer: Trainer) -> bytes:
    state: dict[str, Any] = {
        "potential": trainer.potential.state_dict(),
        "stepper": trainer.stepper.state_dict(),
        "updates": trainer.updates.state(),
        "generator": trainer.order.generator.get_state(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
