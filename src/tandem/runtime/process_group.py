"""The processes of one run: what one of them does for all, and what all must agree on."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from tandem.errors import TandemError, UserError
from tandem.runtime.heartbeat import await_end, beating
from tandem.runtime.launch import Launch

T = TypeVar("T")

# Seconds between two signs of life of a process that works alone.
_BEAT = 5.0
# What torch gets to report by itself that a timeout is over.
_SLACK = timedelta(seconds=2)
_turns = count()
_control: Any = None


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the other processes."""

    message: str
    exit_code: int


class ProcessGroup:
    """The processes that train together; a single one is the trivial case.

    What may fail in one process alone runs inside `gather`, `on_all` or `on_rank0`. There an error
    in any of them ends them all at the same point: the first process that failed raises its own
    error and says it, the others raise one that is `told` already.

    Args:
        launch: this process's place among them.
        group: for plain values, on the CPU; None where there is one process.
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

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; each gets its own result."""
        result: list[T] = []
        self.gather(lambda: result.append(work()))
        return result[0]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 alone; its result in every process."""
        result: list[Any] = [None]

        def only_here() -> None:
            if self.is_rank0:
                result[0] = work()

        self.gather(only_here)
        if self.count > 1:
            dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]

    def rank0_alone(self, work: Callable[[], T]) -> T | None:
        """Run `work` in rank 0 while the others wait, however long it takes.

        Returns:
            The result in rank 0, None in the others.
        """
        done = self._turn(work, range(1))
        return done[0] if done else None

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 and then in all others, which find what it left on disk.

        However long each takes, as in `rank0_alone`.
        """
        done = [*self._turn(work, range(1)), *self._turn(work, range(1, self.count))]
        return done[0]

    def _turn(self, work: Callable[[], T], workers: range) -> list[T]:
        """Run `work` in some of the processes; the own result, in a list.

        No collective is open meanwhile, so that no timeout runs. Those who work show that they are
        alive, and one that ended or froze is noticed.
        """
        here = self.rank in workers
        if self.count == 1:
            return [work()] if here else []
        shared: Any = _get_default_store()
        name = f"turn/{next(_turns)}"
        done: list[T] = []
        failed: list[Exception] = []
        if here:
            every = min(_BEAT, self._patience.total_seconds() / 4)
            # A store of its own, for a wait keeps others from using the same one.
            with beating(shared.clone(), f"{name}/{self.rank}", every):
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
                "same command goes on."
            )
            # All that wait find the same; the first of them says it.
            speaks = self.rank == (1 if other == 0 else 0)
            raise (TandemError(message) if speaks else _told(message, 1)) from error

    def any_rank(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return any(self.gather(lambda: value))

    def require_same(self, **values: str) -> None:
        """Raise UserError, everywhere, unless all processes have the same values."""
        here = {"machine": socket.gethostname(), **values}
        found = self.gather(lambda: here)
        for name in values:
            for rank, other in enumerate(found):
                if other[name] != found[0][name]:
                    message = (
                        f"the {name} of process {rank} (on {other['machine']}) is not that of "
                        f"process 0 (on {found[0]['machine']}). All processes of a run must see "
                        "the same files and be started with the same command."
                    )
                    self.raise_on_all(UserError(message))

    def raise_on_all(self, error: TandemError) -> NoReturn:
        """Raise an error that every process raises at this point; rank 0 says it."""
        self._agreed = True
        raise error if self.is_rank0 else _told(str(error), error.exit_code)

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
            elif _timed_out(error):
                raise TandemError(
                    f"process {self.rank} of {self.count} waited for another one as long as "
                    "timeout_minutes allows: it hangs, or is slower than that. The same command "
                    "goes on from the last checkpoint."
                ) from error
            elif _contact_lost(error):
                raise TandemError(
                    f"process {self.rank} of {self.count} lost contact with another one, which "
                    "has ended or hangs; see its own message. If it has none, it was killed, for "
                    "want of memory perhaps. The same command goes on from the last checkpoint."
                ) from error
            raise


def join(launch: Launch, backend: str, timeout: timedelta) -> ProcessGroup:
    """Get in contact with the other processes; those that are already are left as they are.

    Args:
        launch: this process's place among them.
        backend: what carries tensors between them: gloo, nccl or another of torch's.
        timeout: how long any process waits for another one.

    Raises UserError where the port that they should meet at is taken, and TandemError when they do
    not meet in time.
    """
    global _control
    if launch.count == 1:
        return ProcessGroup(launch)
    if not dist.is_initialized():
        _control = None
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
        # Plain values travel on the CPU, whatever carries gradients.
        _control = dist.new_group(backend="gloo", timeout=timeout)
    return ProcessGroup(launch, _control, timeout)


def leave() -> None:
    """Part from the other processes at the end of a command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def in_words(timeout: timedelta) -> str:
    """A timeout as a person would say it."""
    seconds = timeout.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _meet(launch: Launch, backend: str, timeout: timedelta) -> None:
    failed: list[Exception] = []

    def meet() -> None:
        try:
            dist.init_process_group(
                backend, timeout=timeout, rank=launch.rank, world_size=launch.count
            )
        except Exception as error:
            failed.append(error)

    # In a thread, because torch waits without a limit for a stranger at the port to answer.
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


def _told(message: str, exit_code: int) -> TandemError:
    error = TandemError(message)
    error.exit_code = exit_code
    error.told = True
    return error


def _timed_out(error: Exception) -> bool:
    text = str(error).lower()
    return _contact_lost(error) and ("timed out" in text or "timeout" in text)


def _contact_lost(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
