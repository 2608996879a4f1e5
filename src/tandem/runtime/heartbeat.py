"""Waiting for a process that works alone: as long as it shows that it is alive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_ALIVE, _OVER = b"alive", b"over"
# Seconds between two looks for a sign of life, at first and later.
_SHORT, _LONG = 0.001, 0.5


@contextmanager
def beating(store: Store, name: str, every: float) -> Iterator[None]:
    """While the body works, tell those who `await_end` that this process is alive.

    Args:
        store: what the processes share; a thread of this one writes to it.
        name: of this piece of work, the same in all processes and never used again.
        every: seconds between two signs of life.
    """
    over, beats = threading.Event(), count()

    def beat() -> None:
        with suppress(dist.DistError):  # nobody is left to be told
            while not over.wait(every):
                store.set(f"{name}/{next(beats)}", _ALIVE.decode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(dist.DistError):
            store.set(f"{name}/{next(beats)}", _OVER.decode())


def await_end(store: Store, name: str, patience: timedelta) -> None:
    """Wait until the body of `beating` is through, however long that takes.

    Args:
        store: what the processes share; it is used through a copy.
        name: of the piece of work.
        patience: how long to wait for a sign of life.

    Raises TimeoutError when there was no sign of life for `patience`, and DistError when contact to
    the store is lost.
    """
    heard: SimpleQueue[bytes | Exception] = SimpleQueue()
    left = threading.Event()
    # In a thread, because a store that froze lets go of nobody, whatever the timeout.
    listener = threading.Thread(target=_listen, args=(store, name, heard, left), daemon=True)
    listener.start()
    try:
        word: bytes | Exception = _ALIVE
        while word != _OVER:
            try:
                word = heard.get(timeout=patience.total_seconds())
            except Empty:
                raise TimeoutError(name) from None
            if isinstance(word, Exception):
                raise word
    finally:
        left.set()
        # torch aborts an interpreter that ends while one of its threads is in the store.
        listener.join(timeout=1.0)


def _listen(
    shared: Any, name: str, heard: SimpleQueue[bytes | Exception], left: threading.Event
) -> None:
    """Hand on each sign of life as it comes, up to the last one."""
    pause, beats = _SHORT, count()
    key = f"{name}/{next(beats)}"
    try:
        # A store of its own, for a wait keeps others from using the same one; and here, because
        # one that froze lets nobody in, either.
        store: Any = shared.clone()
        while not left.wait(pause):
            if not store.check([key]):
                pause = min(2 * pause, _LONG)
                continue
            word = store.get(key)
            heard.put(word)
            if word == _OVER:
                return
            key = f"{name}/{next(beats)}"
    except dist.DistError as error:
        heard.put(error)
