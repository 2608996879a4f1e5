"""One run per folder: a lock that a dead process does not hold on to."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.errors import UserError

NAME = ".lock"
# What file systems without locks answer.
_NO_LOCKS = frozenset(
    (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
)


@contextmanager
def folder_lock(folder: Path, log: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold `folder` for this process; it and its parents are made if need be.

    The kernel releases the lock when its holder dies, so a lock file left behind by a killed run
    blocks nobody. Folders made here that end up with nothing in them are removed again, and the
    lock file always is: a run that is refused leaves no trace. Where the file system has no
    locks, `log` is told and the work goes on without one.

    Raises UserError when a live process holds it.
    """
    made = _make(folder)
    path = folder / NAME
    try:
        descriptor = _acquire(path)
        if descriptor is None:
            log(
                f"{folder} is on a file system without locks: see to it that no second run writes "
                "to this folder"
            )
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        for place in made:
            with suppress(OSError):  # it holds something by now
                place.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, the deepest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: Path) -> int | None:
    """Lock a file, made if need be; its descriptor, or None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is in use by another tandem process (pid {holder}). "
                "Wait for it, stop it, or choose another output folder."
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            if error.errno in _NO_LOCKS:
                return None
            raise
        # Its last holder removed the file between our opening and locking it.
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
