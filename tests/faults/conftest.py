"""A sound desk for every test, and no network."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs
from .desk import Desk


@pytest.fixture(scope="session")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The addresses that were asked for; none may be reached."""
    addresses: list[object] = []

    def refuse(*arguments: object, **_: object) -> NoReturn:
        addresses.append(arguments)
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return addresses


@pytest.fixture
def desk(
    tmp_path: Path,
    _model: Path,
    asked: list[object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Desk]:
    """A home folder with a sound model, conversations and pairs; the current folder is in it.

    Afterwards no network address may have been asked for.
    """
    home = tmp_path / "home"
    shutil.copytree(_model, home / "model")
    make_conversations(home / "conversations.jsonl")
    make_pairs(home / "pairs.jsonl")
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield Desk(home, capsys)
    assert asked == []
