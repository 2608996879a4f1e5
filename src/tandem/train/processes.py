"""The processes of one run: what one of them does for all, and what all must agree on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from tandem.errors import TandemError, UserError
from tandem.train.launch import Launch

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the other processes."""

    message: str
    exit_code: int


class Processes:
    """The processes that train together; a single one is the trivial case.

    What may fail in one process alone runs inside `exchange`, `together` or `main`. There an error
    in any of them ends them all at the same point: the first process that failed raises its own
    error and says it, the others raise one that is `told` already.

    Args:
        launch: this process's place among them.
        group: for plain values, on the CPU; None where there is one process.
    """

    def __init__(self, launch: Launch, group: Any = None) -> None:
        self.rank = launch.rank
        self.count = launch.count
        self.local_count = launch.local_count
        self.is_main = launch.rank == 0
        self._group = group
        self._agreed = False

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process; returns all results by rank, in every process."""
        if self.count == 1:
            return [work()]
        error: Exception | None = None
        mine: T | _Failure
        try:
            mine = work()
        except Exception as raised:
            error = raised
            code = raised.exit_code if isinstance(raised, TandemError) else TandemError.exit_code
            mine = _Failure(str(raised), code)
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self._group)
        failed = [rank for rank, value in enumerate(found) if isinstance(value, _Failure)]
        if failed:
            self._agreed = True
            if error is not None and self.rank == failed[0]:
                raise error
            failure: _Failure = found[failed[0]]
            raise _told(failure.message, failure.exit_code)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; each gets its own result."""
        result: list[T] = []
        self.exchange(lambda: result.append(work()))
        return result[0]

    def main(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 alone; its result in every process."""
        result: list[Any] = [None]

        def only_here() -> None:
            if self.is_main:
                result[0] = work()

        self.exchange(only_here)
        if self.count > 1:
            dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 and then in all others, which find what it left on disk."""
        result: list[T] = []
        for turn in (self.is_main, not self.is_main):
            self.exchange(lambda turn=turn: result.append(work()) if turn else None)  # type: ignore[misc]
        return result[0]

    def any_of(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return any(self.exchange(lambda: value))

    def require_same(self, **values: str) -> None:
        """Raise UserError, everywhere, unless all processes have the same values."""
        here = {"machine": socket.gethostname(), **values}
        found = self.exchange(lambda: here)
        for name in values:
            for rank, other in enumerate(found):
                if other[name] != found[0][name]:
                    message = (
                        f"the {name} of process {rank} (on {other['machine']}) is not that of "
                        f"process 0 (on {found[0]['machine']}). All processes of a run must see "
                        "the same files and be started with the same command."
                    )
                    self.end_alike(UserError(message))

    def end_alike(self, error: TandemError) -> NoReturn:
        """Raise an error that every process raises at this point; rank 0 says it."""
        self._agreed = True
        raise error if self.is_main else _told(str(error), error.exit_code)

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        """Around all that the processes do together: none is left waiting for another.

        An error that all agreed on is raised once all are here, so that a launcher, which ends
        the others when one ends, finds nothing unfinished. Contact that is lost because another
        process ended becomes an error that says so.
        """
        self._agreed = False
        try:
            yield
        except Exception as error:
            if self._agreed and self.count > 1:
                with suppress(RuntimeError):
                    dist.barrier(group=self._group)
            elif _contact_lost(error):
                raise TandemError(
                    f"process {self.rank} of {self.count} lost contact with another one, which "
                    "has ended or hangs; see its own message. If it has none, it was killed, for "
                    "want of memory perhaps. The same command goes on from the last checkpoint."
                ) from error
            raise


def leave() -> None:
    """Part from the other processes at the end of a command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _told(message: str, exit_code: int) -> TandemError:
    error = TandemError(message)
    error.exit_code = exit_code
    error.told = True
    return error


def _contact_lost(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
