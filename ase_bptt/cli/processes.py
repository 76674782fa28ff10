"""The shell in several processes, as torchrun begins them: what is said is said once, and all end together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

from ..training.ranks import Ranks, leave

GOODBYE = 5.0
"""Seconds in which processes that were all told to end say so, if none of them has died."""
SILENCE = timedelta(seconds=20)
"""After this the process that speaks has nothing to say any more; less than the 30 s after which torchrun kills."""


class Voice:
    """The voice of the processes of a command, of which one speaks for all.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

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
        if self.alone or self._my_turn(sentence, for_all):
            print(f"ase-bptt: {sentence}", file=sys.stderr, flush=True)
        if self.ranks.writes:
            self.spoken()

    def spoken(self) -> bool:
        """Let it be known that this process has spoken, or wait until the one that speaks has; whether it has."""
        if self.alone:
            return True
        store = self.ranks.store
        assert store is not None
        # Who waits for this process must not wait any longer.
        leave()
        with suppress(RuntimeError):
            if self.ranks.writes:
                store.set("spoken", "")
            else:
                store.wait(["spoken"], SILENCE)
            return True
        return False

    def all_ended(self) -> bool:
        """Whether all processes were told to end; otherwise one of them has died."""
        if self.alone:
            return True
        store = self.ranks.store
        assert store is not None
        leave()
        with suppress(RuntimeError):
            store.add("ended", 1)
            until = time.monotonic() + GOODBYE
            while time.monotonic() < until:
                if store.add("ended", 0) == self.ranks.size:
                    return True
                time.sleep(0.05)
        return False

    def _my_turn(self, sentence: str, for_all: bool) -> bool:
        if not self.ranks.writes and self.spoken() and for_all:
            return False
        assert self.ranks.store is not None
        try:
            return self.ranks.store.add(sentence, 1) == 1
        except RuntimeError:
            return self.ranks.writes
