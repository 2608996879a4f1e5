"""Waiting for a process that works alone: as long as it shows that it is alive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_ALIVE, _OVER = b"alive", b"over"


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

    Raises TimeoutError when there was no sign of life for `patience`, and DistError when contact to
    the store is lost.
    """
    heard: SimpleQueue[bytes | Exception] = SimpleQueue()

    def listen() -> None:
        word = _ALIVE
        try:
            for beat in count():
                if word == _OVER:
                    return
                store.wait([f"{name}/{beat}"], patience)
                heard.put(word := store.get(f"{name}/{beat}"))
        except dist.DistError as error:
            heard.put(error)

    # In a thread, because a store that froze lets go of nobody, whatever the timeout.
    threading.Thread(target=listen, daemon=True).start()
    word: bytes | Exception = _ALIVE
    while word != _OVER:
        try:
            word = heard.get(timeout=patience.total_seconds())
        except Empty:
            raise TimeoutError(name) from None
        if isinstance(word, dist.DistStoreError):
            raise TimeoutError(name) from word
        if isinstance(word, Exception):
            raise word
