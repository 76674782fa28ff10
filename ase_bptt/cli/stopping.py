"""Ctrl-C and SIGTERM end a command in the same orderly way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM came: what a queueing system sends before it kills."""


@contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Raise Terminated where SIGTERM comes within the block.

    Parameters
    ----------
    once : bool
        Be deaf to it afterwards: where one of several processes ends, the others are sent it at any time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def raise_terminated(*_: Any) -> None:
        if once:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if once else before)


@contextmanager
def held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block.

    While a model is compiled and loaded, other people's code catches every exception, and one that
    is to end the command would be lost there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda sent, _: came.append(sent)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise Terminated if signal.SIGTERM in came else KeyboardInterrupt
