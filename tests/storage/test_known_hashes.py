"""Large files are hashed once; a file that may have changed is read again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.storage import known_hashes
from tandem.storage.cache_folder import cache_folder
from tandem.storage.known_hashes import NAME, known_hash


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], tuple[str, bool]]:
    """A file's hash, and whether it was read; a megabyte counts as large, and as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "_LEAST", 100)
    monkeypatch.setattr(known_hashes, "_SETTLED_SECONDS", -1.0)

    def hashed(path: Path) -> tuple[str, bool]:
        reads: list[Path] = []

        def compute(file: Path) -> str:
            reads.append(file)
            return hashlib.sha256(file.read_bytes()).hexdigest()

        return known_hash(path, compute), bool(reads)

    return hashed


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path
) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"a" * 1000)
    small.write_bytes(b"a" * 10)
    assert read(large) == (_sha256(large), True)
    assert read(large) == (_sha256(large), False)
    assert [read(small)[1], read(small)[1]] == [True, True]


def test_what_changed_is_read_again(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path
) -> None:
    """Other bytes of the same size under the same times, too, where another file took the name."""
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    read(file)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    time.sleep(0.02)
    file.write_bytes(b"b" * 1000)
    os.utime(file, ns=times)
    assert read(file) == (_sha256(file), True)
    other = tmp_path / "other"
    other.write_bytes(b"c" * 1000)
    other.replace(file)
    assert read(file) == (_sha256(file), True)
    assert read(file) == (_sha256(file), False)


def test_a_file_that_was_just_written_is_not_remembered(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hashes, "_SETTLED_SECONDS", 3.0)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    assert [read(file)[1], read(file)[1]] == [True, True]
    os.utime(file, (1, 1))  # its other time is of now
    assert [read(file)[1], read(file)[1]] == [True, True]


def test_a_very_large_file_is_waited_for(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hashes, "_SETTLED_SECONDS", 0.05)
    monkeypatch.setattr(known_hashes, "_WORTH_WAITING", 1000)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    assert [read(file)[1], read(file)[1]] == [True, False]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)

    def compute(path: Path) -> str:
        path.write_bytes(b"b" * 1001)
        return "of something"

    assert known_hash(file, compute) == "of something"
    assert read(file) == (_sha256(file), True)


@pytest.mark.parametrize("damage", ["no database", "another hash", "another table", "a folder"])
def test_a_damaged_store_is_done_without(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 1000)
    read(file)
    store = cache_folder() / NAME
    if damage == "no database":
        store.write_bytes(b"nonsense" * 1000)
    elif damage == "a folder":
        store.unlink()
        store.mkdir()
    else:
        change = "UPDATE hashes SET sha256 = 'x'"
        if damage == "another table":
            change = "ALTER TABLE hashes RENAME COLUMN sha256 TO other"
        connection = sqlite3.connect(store)
        connection.execute(change)
        connection.commit()
        connection.close()
    assert read(file) == (_sha256(file), True)
    # What is no database is begun anew.
    assert read(file)[1] is (damage in ("another table", "a folder"))


def test_those_used_longest_ago_are_forgotten(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hashes, "_MOST", 2)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"a" * 1000)
        read(file)
    assert [read(file)[1] for file in reversed(files)] == [False, False, True]
