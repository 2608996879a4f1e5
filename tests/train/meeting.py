"""Two processes that meet and part in some way: what the tests of processes.py start.

As a script it takes a scenario's name and a folder, in which it leaves what it found, by rank.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tandem.errors import TandemError, UserError
from tandem.runtime.launch import launched
from tandem.runtime.process_group import ProcessGroup, join

from ..warm.python import python

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = timedelta(seconds=2)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(scenario: str, home: Path) -> list[subprocess.Popen[str]]:
    """Both processes of a scenario, by rank."""
    port = free_port()
    home.mkdir()
    return [
        subprocess.Popen(
            [python(), "-m", __name__, scenario, str(home)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[str]], home: Path, rank: int) -> dict[str, Any]:
    """What a process found, once it has ended by itself."""
    _, said = processes[rank].communicate(timeout=60)
    path = home / f"{rank}.json"
    assert path.exists(), said
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _caught(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": work()}
    except TandemError as error:
        told, code = error.reported, error.exit_code
        return {"kind": type(error).__name__, "message": str(error), "told": told, "code": code}


def together(processes: ProcessGroup) -> dict[str, Any]:
    """Work longer than the timeout, in turn; fail alone; be asked for another recipe; hang."""
    found: dict[str, Any] = {}

    def work() -> str:
        time.sleep(TIMEOUT.total_seconds() + 0.5)
        return f"done by {processes.rank}"

    def mistake() -> None:
        raise UserError("there is no such model")

    def hang() -> None:
        if processes.rank == 1:
            time.sleep(600)

    found["alone"] = _caught(lambda: processes.rank0_alone(work))
    found["in turn"] = _caught(lambda: processes.rank0_first(work))
    found["mistake"] = _caught(lambda: processes.rank0_alone(mistake))
    found["again"] = _caught(
        lambda: join(launched(), "gloo", TIMEOUT).on_rank0(lambda: "same group")
    )
    found["recipes"] = _caught(lambda: processes.require_same(recipe=f"seed {processes.rank}"))

    def share(work: Callable[[], Any]) -> Any:
        with processes.shared_fate():
            return processes.on_all(work)

    found["hang"] = _caught(lambda: share(hang))
    return found


def frozen(processes: ProcessGroup) -> dict[str, Any]:
    """Rank 0 freezes while the other one waits for it."""
    return _caught(lambda: processes.rank0_alone(lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def dead(processes: ProcessGroup) -> dict[str, Any]:
    """Rank 0 ends without a word while the other one waits for it."""

    def wait() -> None:
        with processes.shared_fate():
            processes.rank0_alone(lambda: os._exit(9))

    return _caught(wait)


def main(scenario: str, home: Path) -> None:
    """Meet once both are there, so that the time to start counts for nothing."""
    launch = launched()

    def both(what: str) -> None:
        (home / f"{launch.rank}.{what}").touch()
        while not (home / f"{1 - launch.rank}.{what}").exists():
            time.sleep(0.01)

    both("here")
    processes = join(launch, "gloo", TIMEOUT)
    both("joined")  # one that died before would keep the other one from joining
    found = {"together": together, "frozen": frozen, "dead": dead}[scenario](processes)
    (home / f"{launch.rank}.json").write_text(json.dumps(found))
    # As a command that fails, none parts from the others in good form.


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
