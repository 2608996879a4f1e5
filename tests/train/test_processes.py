"""Processes that wait for each other: for as long as it takes, and no longer."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tandem.errors import TandemError, UserError
from tandem.runtime import signs_of_life
from tandem.runtime.launch import Launch
from tandem.runtime.process_group import in_words, join
from tandem.runtime.signs_of_life import await_end, beating, connection

from .meeting import ended, start


def test_waiting_has_no_limit_but_hanging_has_one(tmp_path: Path) -> None:
    """Three pairs of processes at once; their timeout is two seconds."""
    homes = {name: tmp_path / name for name in ("together", "frozen", "dead")}
    started = {name: start(name, home) for name, home in homes.items()}
    try:
        main = ended(started["together"], homes["together"], 0)
        frozen = ended(started["frozen"], homes["frozen"], 1)
        dead = ended(started["dead"], homes["dead"], 1)
        # Rank 1 hangs for good; what it found until then is not written.
        assert started["together"][1].poll() is None
    finally:
        for process in (p for pair in started.values() for p in pair):
            process.kill()
            process.communicate()

    assert main["alone"] == main["in turn"] == {"result": "done by 0"}
    assert main["mistake"]["message"] == "there is no such model"
    assert (main["mistake"]["code"], main["mistake"]["told"]) == (2, False)
    assert main["again"] == {"result": "same group"}
    assert main["recipes"]["kind"] == "UserError"
    assert "the recipe of process 1" in main["recipes"]["message"]
    assert "waited for another one as long as timeout_minutes allows" in main["hang"]["message"]
    assert main["hang"]["code"] == 1

    assert "process 0 of 2 gave no sign of life for 2 seconds" in frozen["message"]
    assert (frozen["code"], frozen["told"]) == (1, False)
    # Whichever it notices first: that nobody answers, or that nothing was heard.
    noticed = (
        "process 1 of 2 lost contact with another one",
        "process 0 of 2 gave no sign of life",
    )
    assert any(words in dead["message"] for words in noticed)


def test_a_port_in_use_is_the_users_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(UserError, match=r"MASTER_PORT \d+ is in use on this machine"):
            join(Launch(0, 2, 0, 2), "gloo", timedelta(seconds=10))
    assert not dist.is_initialized()


def test_a_stranger_at_the_port_is_not_waited_for_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(TandemError, match=rf"process 1 of 2 did not meet .* 127.0.0.1:{port}"):
            join(Launch(1, 2, 1, 2), "gloo", timedelta(seconds=0.5))
    assert not dist.is_initialized()


def test_processes_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 .* MASTER_ADDR expected, but not set"):
        join(Launch(1, 2, 1, 2), "gloo", timedelta(seconds=10))


def test_one_process_needs_no_contact() -> None:
    processes = join(Launch(), "gloo", timedelta(seconds=1))
    assert (processes.count, processes.rank0_alone(lambda: 3)) == (1, 3)
    assert not dist.is_initialized()


def test_timeouts_in_words() -> None:
    assert in_words(timedelta(minutes=90)) == "90 minutes"
    assert in_words(timedelta(seconds=2.5)) == "2.5 seconds"


def test_a_connection_to_the_store_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    made: list[Any] = []

    class Shared:
        def clone(self) -> Any:
            made.append(store.clone())
            return made[-1]

    monkeypatch.setattr(signs_of_life, "_idle", [])
    for number in range(4):
        with connection(Shared()) as own, beating(own, f"work/{number}", 1.0):
            pass
        await_end(Shared(), f"work/{number}", timedelta(seconds=9))  # type: ignore[arg-type]
    assert len(made) == 1
    with pytest.raises(ZeroDivisionError), connection(Shared()):
        raise ZeroDivisionError
    assert signs_of_life._idle == []  # one that failed may be broken
