"""The processes of one run: work that one of them does for all, and values that must agree."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tandem.errors import TandemError, UserError
from tandem.runtime.launch import Launch
from tandem.runtime.signs_of_life import await_end, beating, connection, forget_connections

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_BEAT = 5.0  # seconds between two signs of life of a process that works alone
_SLACK = timedelta(seconds=2)  # for torch to report a timeout itself
_turns = count()
_control: Any = None


def _dist() -> Any:
    """Import torch.distributed, which a process that is alone does without."""
    import torch.distributed

    return torch.distributed


@dataclass(frozen=True)
class _Failure:
    """An error that is sent to the other processes."""

    message: str
    exit_code: int


class ProcessGroup:
    """The processes that train together; a single one is the trivial case.

    Work that may fail in one process alone runs inside `gather`, `on_all` or `on_rank0`. An error
    in any process then ends all of them at the same point: the first one that failed raises its
    own error and reports it, the others raise one that is marked as `reported`.

    Args:
        launch: this process's rank and the number of processes.
        group: carries plain values on the CPU; None for one process.
        patience: how long `rank0_alone` and `rank0_first` wait for a sign of life.
    """

    def __init__(
        self, launch: Launch, group: Any = None, patience: timedelta = timedelta(hours=1)
    ) -> None:
        self.rank = launch.rank
        self.count = launch.count
        self.local_count = launch.local_count
        self.is_rank0 = launch.rank == 0
        self._group = group
        self._patience = patience
        self._agreed = False

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process; return all results by rank, in every process."""
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
        results: list[Any] = [None] * self.count
        _dist().all_gather_object(results, mine, group=self._group)
        failed = [rank for rank, value in enumerate(results) if isinstance(value, _Failure)]
        if failed:
            self._agreed = True
            if error is not None and self.rank == failed[0]:
                raise error
            failure: _Failure = results[failed[0]]
            raise _reported(failure.message, failure.exit_code)
        return results

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; return each process's own result."""
        result: list[T] = []
        self.gather(lambda: result.append(work()))
        return result[0]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 alone; return its result in every process."""
        result: list[Any] = [None]

        def only_here() -> None:
            if self.is_rank0:
                result[0] = work()

        self.gather(only_here)
        if self.count > 1:
            _dist().broadcast_object_list(result, src=0, group=self._group)
        return result[0]

    def rank0_alone(self, work: Callable[[], T]) -> T | None:
        """Run `work` in rank 0, however long it takes; return its result there, None elsewhere."""
        done = self._turn(work, range(1))
        return done[0] if done else None

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0, then in all others, which find its files on disk."""
        done = [*self._turn(work, range(1)), *self._turn(work, range(1, self.count))]
        return done[0]

    def _turn(self, work: Callable[[], T], workers: range) -> list[T]:
        """Run `work` in some of the processes; return this one's result, in a list.

        No collective is open meanwhile, so no timeout runs. A working process gives signs of life,
        so that the others notice if it ended or froze.
        """
        here = self.rank in workers
        if self.count == 1:
            return [work()] if here else []
        shared: Any = _dist().distributed_c10d._get_default_store()
        name = f"turn/{next(_turns)}"
        done: list[T] = []
        failed: list[Exception] = []
        if here:
            every = min(_BEAT, self._patience.total_seconds() / 4)
            # A connection of its own, because a wait blocks a store for others.
            with connection(shared) as own, beating(own, f"{name}/{self.rank}", every):
                try:
                    done.append(work())
                except Exception as error:
                    failed.append(error)
        for other in workers:
            if other != self.rank:
                self._await(other, shared, f"{name}/{other}")

        def outcome() -> None:
            if failed:
                raise failed[0]

        self.gather(outcome)
        return done

    def _await(self, other: int, store: Store, name: str) -> None:
        try:
            await_end(store, name, self._patience)
        except TimeoutError as error:
            message = (
                f"process {other} of {self.count} gave no sign of life for "
                f"{in_words(self._patience)} (timeout_minutes) while others waited for it. The "
                "same command resumes the run."
            )
            # All that wait find the same; the first of them reports it.
            speaks = self.rank == (1 if other == 0 else 0)
            raise (TandemError(message) if speaks else _reported(message, 1)) from error

    def any_rank(self, value: bool) -> bool:
        """Return whether a value is true in any process."""
        return any(self.gather(lambda: value))

    def require_same(self, **values: str) -> None:
        """Raise UserError, everywhere, unless all processes have the same values."""
        here = {"machine": socket.gethostname(), **values}
        places = self.gather(lambda: here)
        for name in values:
            for rank, other in enumerate(places):
                if other[name] != places[0][name]:
                    message = (
                        f"the {name} of process {rank} (on {other['machine']}) is not that of "
                        f"process 0 (on {places[0]['machine']}). All processes of a run must see "
                        "the same files and be started with the same command."
                    )
                    self.raise_on_all(UserError(message))

    def raise_on_all(self, error: TandemError) -> NoReturn:
        """Raise an error that every process raises at this point; rank 0 reports it."""
        self._agreed = True
        raise error if self.is_rank0 else _reported(str(error), error.exit_code)

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        """Surround all work of the processes, so that none is left waiting for another.

        An error that all processes raise leaves here when all have reached this point, because a
        launcher ends the others as soon as one ends. Lost contact becomes an error that says so.
        """
        self._agreed = False
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            if self._agreed:
                with suppress(RuntimeError):
                    _dist().barrier(group=self._group)
            elif _contact_lost(error):
                text = str(error).lower()
                what = (
                    "lost contact with another one, which has ended or hangs; see its own message. "
                    "If it has none, it was killed, for want of memory perhaps."
                )
                if "timed out" in text or "timeout" in text:
                    what = (
                        "waited for another one as long as timeout_minutes allows: it hangs, or is "
                        "slower than that."
                    )
                raise TandemError(
                    f"process {self.rank} of {self.count} {what} The same command resumes from "
                    "the last checkpoint."
                ) from error
            raise


def join(launch: Launch, backend: str, timeout: timedelta) -> ProcessGroup:
    """Connect to the other processes, unless this one is connected already.

    `backend` is torch's, gloo or nccl for instance; `timeout` is how long any process waits for
    another. Raises UserError if the port is taken, TandemError if they do not meet in time.
    """
    global _control
    if launch.count == 1:
        return ProcessGroup(launch)
    dist = _dist()
    if not dist.is_initialized():
        _control = None
        forget_connections()
        _meet(launch, backend, timeout)
    obtained = (dist.get_rank(), dist.get_world_size())
    if obtained != (launch.rank, launch.count):
        raise TandemError(
            f"launched as process {launch.rank} of {launch.count}, but in contact as {obtained[0]} "
            f"of {obtained[1]}"
        )
    if dist.get_backend() == "gloo":
        return ProcessGroup(launch, dist.group.WORLD, timeout)
    if _control is None:
        # Plain values are sent on the CPU, whatever carries gradients.
        _control = dist.new_group(backend="gloo", timeout=timeout)
    return ProcessGroup(launch, _control, timeout)


def leave() -> None:
    """Disconnect from the other processes at the end of a command."""
    dist: Any = sys.modules.get("torch.distributed")
    forget_connections()
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def in_words(timeout: timedelta) -> str:
    """Write a timeout in minutes or seconds."""
    seconds = timeout.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _meet(launch: Launch, backend: str, timeout: timedelta) -> None:
    dist = _dist()
    failed: list[Exception] = []

    def meet() -> None:
        try:
            dist.init_process_group(
                backend, timeout=timeout, rank=launch.rank, world_size=launch.count
            )
        except Exception as error:
            failed.append(error)

    # In a thread, because torch waits for ever for another program at the port to answer.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join((timeout + _SLACK).total_seconds())
    if meeting.is_alive():
        raise _not_met(launch, timeout, "what listens there does not answer")
    if not failed:
        return
    error = failed[0]
    if "EADDRINUSE" in str(error):
        raise UserError(
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is in use on this machine, by an earlier "
            "run perhaps. Name another one (deepspeed --master_port, torchrun --master-port, "
            "accelerate launch --main_process_port); --nproc finds a free one"
        ) from error
    if isinstance(error, ValueError):  # torch says which variable is missing
        raise UserError(
            f"WORLD_SIZE is {launch.count} in the environment, but: {error}. Start the processes "
            "with torchrun, deepspeed, accelerate launch or --nproc"
        ) from error
    if isinstance(error, dist.DistError):
        raise _not_met(launch, timeout, str(error).splitlines()[0]) from error
    raise error


def _not_met(launch: Launch, timeout: timedelta, why: str) -> TandemError:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return TandemError(
        f"process {launch.rank} of {launch.count} did not meet the others at {place} (MASTER_ADDR, "
        f"MASTER_PORT) within {in_words(timeout)}: {why}"
    )


def _reported(message: str, exit_code: int) -> TandemError:
    error = TandemError(message)
    error.exit_code = exit_code
    error.reported = True
    return error


def _contact_lost(error: Exception) -> bool:
    if isinstance(error, _dist().DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
