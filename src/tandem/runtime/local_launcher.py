"""Run one command in several processes on this machine, with torch's launcher."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tandem.errors import Stopped, TandemError, UserError
from tandem.runtime.device import count_devices
from tandem.runtime.launch import RESTART_FILE

_RESTARTS = 8


def check_devices(count: int, device: str) -> None:
    """Raise UserError unless this machine has a device for each of `count` processes."""
    devices = count_devices(device)
    if devices is not None and count > devices:
        kind = "GPU" if device == "auto" else f"{device.upper()} device"
        raise UserError(
            f"--nproc {count}: this machine has {_counted(devices, kind)}, and each process "
            "needs one of its own"
        )


def run_processes(count: int, command: Sequence[str], *, log: Callable[[str], None]) -> int:
    """Run a command in several processes of this machine, and return their exit code.

    They meet at a free port, and SIGINT and SIGTERM are passed on to them. They are started again
    if they asked for it (`launch.ask_for_restart`). `log` reports what the processes cannot.
    """
    # torch reports each failure in a box and a log line; the processes have reported it already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    variables: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        variables["OMP_NUM_THREADS"] = str(threads)
        log(f"{_counted(count, 'process')}, each of {_counted(threads, 'thread')}")
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        word = Path(folder) / "restart"
        variables[RESTART_FILE] = str(word)
        with _inherited(variables):
            return _run_again(count, command, folder, word, log)


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_again(
    count: int, command: Sequence[str], folder: str, word: Path, log: Callable[[str], None]
) -> int:
    """Run the processes as often as they ask for it in the file `word`; their exit code."""
    for turn in range(_RESTARTS + 1):
        end = _run(count, command, folder)
        if end.asked is not None:
            return _stopped(end, end.asked, log)
        reason = word.read_text().strip() if word.exists() else ""
        # The others may have ended with another code, because they lost contact.
        if end.code == 0 or not reason:
            break
        if turn == _RESTARTS:
            log(f"started again {_RESTARTS} times and asked once more: {reason}")
            break
        log(f"starting the processes again: {reason}")
        word.unlink()
    for line in end.killed():
        log(line)
    return end.code


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


@dataclass(frozen=True)
class _End:
    """How the processes ended: exit codes of those that failed by rank, and the signal, if any."""

    codes: Mapping[int, int]
    asked: signal.Signals | None = None

    @property
    def code(self) -> int:
        """The exit code for all: that of a process which chose its own, if there is one."""
        own = [self.codes[rank] for rank in sorted(self.codes) if self.codes[rank] > 0]
        return own[0] if own else TandemError.exit_code if self.codes else 0

    def killed(self) -> Iterator[str]:
        """Yield a line for each process that a signal ended, except the launcher's SIGTERM."""
        for rank, code in sorted(self.codes.items()):
            if code < 0 and -code != signal.SIGTERM:
                yield f"error: process {rank} was ended by {signal.Signals(-code).name}"


def _stopped(end: _End, asked: signal.Signals, log: Callable[[str], None]) -> int:
    if not end.codes or any(code > 0 for code in end.codes.values()):
        return end.code
    # The signal came where a process could only end at once.
    log(f"stopped by {asked.name}; the same command resumes the run")
    return Stopped.exit_code


def _run(count: int, command: Sequence[str], folder: str) -> _End:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        # SIGINT and SIGTERM end a run after its step, which may take longer than torch waits.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    with _passing_on() as asked:
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _End(codes, asked[0] if asked else None)
        except SignalException as error:
            return _End({0: -error.sigval}, error.sigval)
    return _End({})


@contextmanager
def _passing_on() -> Iterator[list[signal.Signals]]:
    """Pass SIGINT and SIGTERM on to the processes; yield a list of those that came, in order."""
    asked: list[signal.Signals] = []

    def pass_on(number: int, _frame: Any) -> None:
        asked.append(signal.Signals(number))
        started = psutil.Process().children()
        for process in started:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if not started:
            raise KeyboardInterrupt

    previous = {one: signal.signal(one, pass_on) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
