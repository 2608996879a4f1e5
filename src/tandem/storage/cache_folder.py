"""The cache folder, outside the runs' folders: its place, its size, and how it is emptied."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# A half-written folder that is older belongs to a process that has ended.
_ABANDONED_SECONDS = 24 * 3600.0


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/tandem`, with `~` and variables resolved, else `~/.cache/tandem`.

    A relative `$XDG_CACHE_HOME` does not count, as the XDG Base Directory Specification says.
    Raises FileNotFoundError for an account without a home folder.
    """
    try:
        base = Path(os.path.expandvars(os.environ.get("XDG_CACHE_HOME", ""))).expanduser()
        return (base if base.is_absolute() else Path.home() / ".cache") / "tandem"
    except RuntimeError:  # pathlib's, where neither $HOME nor the account's entry names one
        raise FileNotFoundError(
            errno.ENOENT, "this account has no home folder; set XDG_CACHE_HOME to have a cache"
        ) from None


def cache_report() -> list[tuple[str, int]]:
    """Return names and sizes in bytes of the cache's entries; raise OSError if it is unreadable."""
    folder = cache_folder()
    return [(str(entry.relative_to(folder)), size_of(entry)) for entry in _entries(folder)]


def clear_cache() -> int:
    """Delete the cache's entries, and return the bytes freed."""
    folder = cache_folder()
    before = size_of(folder)
    for entry in list(_entries(folder)):
        remove(entry)
    return max(0, before - size_of(folder))


def prune_folders(folder: Path, limit_bytes: int, keep: Path) -> int:
    """Remove the longest unused folders in `folder` until it is within the limit; return how many.

    A folder's last use is its modification time. `keep` stays, whatever its size. Abandoned
    half-written folders go as well, uncounted.
    """
    entries = []
    for entry in folder.iterdir():
        if not entry.is_dir():
            continue
        with suppress(FileNotFoundError):  # another process removes, too
            used = entry.stat().st_mtime
            if not entry.name.startswith("."):
                entries.append((used, entry, size_of(entry)))
            elif time.time() - used > _ABANDONED_SECONDS:
                remove(entry)
    total = sum(size for _, _, size in entries)
    removed = 0
    for _, entry, size in sorted(entries):
        if total > limit_bytes and entry != keep:
            remove(entry)
            total -= size
            removed += 1
    return removed


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; links are not followed."""
    with suppress(FileNotFoundError):  # another process removes, too
        if path.is_dir() and not path.is_symlink():
            return sum(size_of(inner) for inner in path.iterdir())
        return path.lstat().st_size
    return 0


def remove(path: Path) -> None:
    """Delete a file or folder; a folder is renamed first, so that nobody finds half of it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.gone")
    with suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the files of the cache, and what its folders hold."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(folder))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())
        else:
            yield path
