"""Remembers the hashes of large files in the cache folder: gigabytes of weights are read once.

A hash counts while the file's path, device, inode, size and times are what they were. Nothing is
remembered of a file that was changed just before: a second change might leave the same times. With
very large ones it is worth waiting until their times have settled.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from tandem.storage.cache_folder import cache_folder

NAME = "hashes.sqlite"
_LEAST = 8 << 20  # bytes; smaller files are read again in no time
_MOST = 10_000  # files; those used longest ago are forgotten first
# Some file systems count times in seconds, or in two.
_SETTLED_SECONDS = 3.0
_WORTH_WAITING = 2 << 30  # bytes, which take longer to read again

T = TypeVar("T")


def known_hash(path: Path, compute: Callable[[Path], str]) -> str:
    """Return a file's hash as it is remembered, or else as `compute` finds it."""
    before = path.stat()
    if before.st_size < _LEAST:
        return compute(path)
    state = _state(before)
    if (known := _kept(lambda kept: _find(kept, path, state))) is not None:
        return known
    unsettled = _SETTLED_SECONDS - (time.time() - max(before.st_mtime, before.st_ctime))
    if before.st_size >= _WORTH_WAITING and 0 < unsettled <= _SETTLED_SECONDS:
        time.sleep(unsettled)
        unsettled = 0.0
    settled = unsettled <= 0
    computed = compute(path)
    if settled and _state(path.stat()) == state:
        _kept(lambda kept: _remember(kept, path, state, computed))
    return computed


def _find(kept: sqlite3.Connection, path: Path, state: str) -> str | None:
    query = "SELECT sha256, checksum FROM hashes WHERE path = ? AND state = ?"
    found = kept.execute(query, (str(path), state)).fetchone()
    if found is None or found[1] != _checksum(path, state, found[0]):
        return None
    kept.execute("UPDATE hashes SET used = ? WHERE path = ?", (time.time(), str(path)))
    return str(found[0])


def _remember(kept: sqlite3.Connection, path: Path, state: str, sha256: str) -> None:
    row = (str(path), state, sha256, _checksum(path, state, sha256), time.time())
    kept.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", row)
    kept.execute(
        "DELETE FROM hashes WHERE path NOT IN (SELECT path FROM hashes ORDER BY used DESC LIMIT ?)",
        (_MOST,),
    )


def _kept(work: Callable[[sqlite3.Connection], T]) -> T | None:
    """Return what `work` returns; None without a cache that can be used: then files are read."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / NAME, timeout=5)) as kept, kept:
            kept.execute(
                "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, state TEXT, "
                "sha256 TEXT, checksum TEXT, used REAL)"
            )
            return work(kept)
    except sqlite3.DatabaseError as error:
        if not isinstance(error, sqlite3.OperationalError):  # which another process may cause
            (folder / NAME).unlink(missing_ok=True)
    except OSError:
        pass
    return None


def _state(stat: os.stat_result) -> str:
    """What changes when a file does."""
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return " ".join(map(str, (stat.st_dev, stat.st_ino, stat.st_size, *times)))


def _checksum(path: Path, state: str, sha256: str) -> str:
    return hashlib.sha256(f"{path}\0{state}\0{sha256}".encode(errors="surrogateescape")).hexdigest()
