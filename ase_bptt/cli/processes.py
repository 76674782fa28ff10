"""The shell in several processes, as torchrun begins them: what is said is said once, and all end together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress

from torch import distributed as dist

from ..training.ranks import Ranks, leave

GOODBYE = 5.0
"""Seconds in which all processes come to their end, if none of them has died."""
SILENCE = 20.0
"""Seconds after which the process that speaks will say nothing; torchrun kills after 30."""


class Voice:
    """The voice of the processes of a command, of which one speaks for all.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._ended = False

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.ranks.store is None

    @contextmanager
    def silenced(self, *, errors: bool) -> Iterator[None]:
        """Nothing goes to standard output, or to standard error, but from the process that speaks."""
        if self.ranks.writes:
            yield
            return
        with ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
            yield

    def say(self, sentence: str, *, for_all: bool = False) -> None:
        """To standard error, once, however many processes come to say it.

        Parameters
        ----------
        sentence : str
        for_all : bool
            Whether all is said where the process that speaks has said anything; otherwise each says what is its own.
        """
        if not for_all:
            leave()  # the others may wait for this process
        self._end()
        if self._my_turn(sentence, for_all):
            print(f"ase-bptt: {sentence}", file=sys.stderr, flush=True)
        if self.ranks.store is not None and self.ranks.writes:
            with suppress(RuntimeError):
                self.ranks.store.set("spoken", "")
            if not for_all:
                self.all_ended()  # torchrun would end the others with this one

    def all_ended(self) -> bool:
        """Whether all processes have come to their end by themselves; otherwise one of them has died."""
        if self.ranks.store is None:
            return True
        self._end()
        return _soon(lambda store: store.add("ended", 0) == self.ranks.size, self.ranks.store, GOODBYE)

    def _end(self) -> None:
        if self.ranks.store is None or self._ended:
            return
        self._ended = True
        with suppress(RuntimeError):
            self.ranks.store.add("ended", 1)

    def _my_turn(self, sentence: str, for_all: bool) -> bool:
        store = self.ranks.store
        if store is None:
            return True
        if not self.ranks.writes:
            heard = _soon(lambda store: store.check(["spoken"]), store, GOODBYE if for_all else SILENCE)
            if heard and for_all:
                return False
        try:
            return store.add(sentence, 1) == 1
        except RuntimeError:
            return self.ranks.writes


def _soon(asked: Callable[[dist.Store], bool], store: dist.Store, patience: float) -> bool:
    """Whether the answer is yes within so many seconds; no where nobody answers."""
    until = time.monotonic() + patience
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if asked(store):
                return True
            time.sleep(0.05)
    return False
