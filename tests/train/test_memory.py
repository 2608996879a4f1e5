"""Running out of memory: what is split, what is given up, and in whose name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from tandem.errors import Stopped, UserError
from tandem.runtime.launch import RESTART_FILE, Launch
from tandem.runtime.process_group import ProcessGroup
from tandem.train.token_budget import TokenBudget, ran_out

TOKENS = [90, 40, 40, 10]


def budget(tokens: int, *, alone: bool) -> tuple[TokenBudget, list[int]]:
    """A budget, and what it remembers."""
    remembered: list[int] = []
    return TokenBudget(tokens, lambda: None, remembered.append, alone=alone), remembered


def room_for(most: int) -> Callable[[Sequence[int], bool], str]:
    """Work that runs out of memory beyond so many tokens."""

    def compute(members: Sequence[int], _last: bool) -> str:
        if sum(TOKENS[i] for i in members) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ",".join(map(str, members))

    return compute


def no_room(position: int) -> UserError:
    return UserError(f"no room for {position}")


def test_what_does_not_fit_is_split_and_so_is_the_rest() -> None:
    made, remembered = budget(200, alone=True)
    done = made.run([(0, 1), (2, 3)], TOKENS, room_for(90), no_room)
    # 130 tokens were too many, so 65 are tried: a tree of 90 stays whole.
    assert done == [((0,), "0"), ((1,), "1"), ((2, 3), "2,3")]
    assert made.tokens == 65
    assert remembered == []
    made.settle([made.tokens, 50], ProcessGroup(Launch()))
    made.settle([50], ProcessGroup(Launch()))
    assert remembered == [50], "once, when all processes know"


def test_a_tree_is_tried_twice_alone() -> None:
    made, _ = budget(200, alone=True)
    with pytest.raises(UserError, match="no room for 0"):
        made.run([(0,)], TOKENS, room_for(80), no_room)
    calls: list[int] = []

    def once(members: Sequence[int], _last: bool) -> str:
        calls.append(1)
        return room_for(80 if len(calls) == 1 else 90)(members, _last)

    assert made.run([(0,)], TOKENS, once, no_room) == [((0,), "0")]


def test_where_others_wait_it_stops_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESTART_FILE, raising=False)
    made, remembered = budget(200, alone=False)
    with pytest.raises(Stopped, match="with 65 tokens a micro-batch, by the same command"):
        made.run([(0, 1)], TOKENS, room_for(80), no_room)
    assert remembered == [65]
    # The next start makes a micro-batch of the long tree alone, and no start can do better.
    made, remembered = budget(65, alone=False)
    with pytest.raises(UserError, match="no room for 0"):
        made.run([(0,)], TOKENS, room_for(80), no_room)
    assert remembered == []


def test_what_running_out_looks_like() -> None:
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert ran_out(MemoryError())
    assert ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"))
    assert not ran_out(RuntimeError("shape mismatch"))
    assert not ran_out(OSError("out of memory cards"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        budget(9, alone=True)[0].run([(0,)], TOKENS, _broken, no_room)


def _broken(_members: Sequence[int], _last: bool) -> str:
    raise RuntimeError("shape mismatch")


def test_the_restart_file_gets_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    word = tmp_path_factory.mktemp("restart") / "word"
    monkeypatch.setenv(RESTART_FILE, os.fspath(word))
    with pytest.raises(Stopped) as stopped:
        budget(200, alone=False)[0].run([(0, 1)], TOKENS, room_for(80), no_room)
    assert word.read_text() == str(stopped.value)
    assert "same command" not in word.read_text()
