"""Signs of life that a process gives while it works alone, through the store all share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_ALIVE, _OVER = b"alive", b"over"
_SHORT, _LONG = 0.001, 0.5  # seconds between two checks for a sign of life, at first and later
# Connections to the store that nothing waits on now. To connect may take seconds, where torch looks
# for the name of an address and no name server answers.
_idle: list[Any] = []


def _lost_contact() -> type[Exception]:
    """What torch raises where the store is lost; a process that is alone does not import it."""
    import torch.distributed

    error: type[Exception] = torch.distributed.DistError
    return error


def forget_connections() -> None:
    """Forget connections to a store that this process leaves."""
    _idle.clear()


@contextmanager
def connection(store: Any) -> Iterator[Any]:
    """A connection to the store that no other thread uses; kept for the next one, unless it fails.

    `store` is the process group's own, which lasts until the processes `leave`.
    """
    try:
        own = _idle.pop()
    except IndexError:
        own = store.clone()
    yield own
    _idle.append(own)


@contextmanager
def beating(store: Store, name: str, every: float) -> Iterator[None]:
    """Give a sign of life every `every` seconds while the body works, for `await_end`.

    `name` identifies this piece of work, the same in all processes and never used again.
    """
    lost = _lost_contact()
    over, beats = threading.Event(), count()

    def beat() -> None:
        with suppress(lost):  # no process is left to listen
            while not over.wait(every):
                store.set(f"{name}/{next(beats)}", _ALIVE.decode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(lost):
            store.set(f"{name}/{next(beats)}", _OVER.decode())


def await_end(store: Store, name: str, patience: timedelta) -> None:
    """Wait until the body of `beating` ends, however long that takes.

    Raises TimeoutError without a sign of life for `patience`, DistError if the store is lost.
    """
    heard: SimpleQueue[bytes | Exception] = SimpleQueue()
    left = threading.Event()
    # In a thread, because a call of a frozen store never returns, whatever the timeout.
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
    """Pass on each sign of life up to the last one."""
    lost = _lost_contact()
    pause, beats = _SHORT, count()
    key = f"{name}/{next(beats)}"
    try:
        # A connection of its own, because a wait blocks a store for others; made in this thread,
        # because a frozen store blocks that as well.
        with connection(shared) as store:
            while not left.wait(pause):
                if not store.check([key]):
                    pause = min(2 * pause, _LONG)
                    continue
                word = store.get(key)
                heard.put(word)
                if word == _OVER:
                    return
                key = f"{name}/{next(beats)}"
    except lost as error:
        heard.put(error)
