"""One run per folder: a lock that ends with its process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tandem.errors import UserError

NAME = ".lock"
# Seconds to wait: a run that is ending may remove the file that another one has just opened.
_HANDING_OVER = 0.2
# The errors of file systems without locks.
_NO_LOCKS = frozenset(
    (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
)


@contextmanager
def folder_lock(folder: Path, log: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Lock `folder` for this process; it and its parents are made if need be.

    The kernel releases the lock when its holder dies, so the lock file of a killed run blocks
    nobody. The lock file is removed at the end, and so are folders made here that are empty: a run
    that is refused leaves no trace. Where the file system has no locks, `log` says so and the work
    goes on without one. Raises UserError when a live process has the lock.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    lock = FileLock(path, fallback_to_soft=False, timeout=_HANDING_OVER, poll_interval=0.02)
    try:
        _acquire(lock, path, log)
        try:
            yield
        finally:
            if lock.is_locked:
                path.unlink(missing_ok=True)
                lock.release()
    finally:
        for place in missing:
            with suppress(OSError):  # it is no longer empty
                place.rmdir()


def check_free(folder: Path) -> None:
    """Raise UserError when a live process holds a folder; nothing is written but its lock."""
    if (folder / NAME).exists():
        with folder_lock(folder):
            pass


def _acquire(lock: FileLock, path: Path, log: Callable[[str], None]) -> None:
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace").strip() if path.exists() else ""
        raise UserError(
            f"{path.parent} is in use by another tandem process (pid {holder or 'unknown'}). "
            "Wait for it, stop it, or choose another output folder."
        ) from None
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in _NO_LOCKS:
            raise
        log(
            f"{path.parent} is on a file system without locks: see to it that no second run writes "
            "to this folder"
        )
        return
    path.write_text(str(os.getpid()))
