"""Files that are either whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from tandem.errors import UserError

# The error handler for lone surrogates, which stand for bytes of file names that are not UTF-8.
# They are written as JSON escapes, and reading turns these back.
HALVES = "backslashreplace"
# The errors of file systems that cannot sync; nothing makes data safer there.
_CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
# And of those that cannot open or sync folders.
_CANNOT_SYNC_FOLDERS = _CANNOT_SYNC | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
# Half-written files: the final name, the writing machine (not in older versions), the process.
_ASIDE = re.compile(r"\..+\.(?:(?P<host>[\w-]+)@)?(?P<process>\d+)\.tmp")
# Seconds after which a half-written file of another machine counts as left behind.
_ABANDONED_SECONDS = 24 * 3600.0


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    atomic_write_parts(path, [text])


def atomic_write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write texts one after the other, never all in memory; see `atomic_write_text`."""
    with atomic_file(path) as file:
        for part in parts:
            file.write(part.encode(errors=HALVES))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; when the block ends without an error it becomes `path`.

    A reader sees the old file or the whole new one, also after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    aside = aside_of(path)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            sync_open(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; see `atomic_write_text`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path, way_out: str = "Copy or download it again.") -> dict[str, Any]:
    """Return the JSON object in another program's file, or raise UserError with the way out."""
    try:
        value = read_json(path)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. {way_out}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object. {way_out}")
    return value


def append_jsonl(path: Path, value: Any) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8", errors=HALVES) as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, without the unfinished last line of a killed run."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends without an error it replaces `path`.

    Files are synced before the rename, so a folder under its final name is complete even after a
    power cut. They get the rights of any new file, because safetensors lets nobody else read its
    files. Raises OSError for what the disk refused, also where a library raises its own error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        rights = aside.stat().st_mode & 0o666
        for file in aside.rglob("*"):
            if file.is_file():
                with suppress(OSError):  # a file system without rights
                    file.chmod(rights)
                sync(file)
        sync(aside)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        sync(path.parent)
    except Exception as error:
        number = None if isinstance(error, OSError) else _error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Return where this process writes what becomes `path` when it is whole."""
    return path.with_name(f".{path.name}.{_host()}@{os.getpid()}.tmp")


def remove_left_behind(folder: Path) -> None:
    """Remove half-written files, in a folder and its folders, whose processes have ended.

    The caller must not be writing there. Files of another machine, whose processes cannot be looked
    up, count as left behind when they have not changed for a day.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        match = _ASIDE.fullmatch(path.name)
        if match is None or _is_written(path, match["host"] or _host(), int(match["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_written(path: Path, host: str, process: int) -> bool:
    """Return whether a process may still be writing a file or folder."""
    if host != _host():
        return time.time() - _last_change(path) < _ABANDONED_SECONDS
    if process == os.getpid():  # a restarted container may give the same number again
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # alive, and another user's
        pass
    return True


def _last_change(path: Path) -> float:
    changed = 0.0
    for one in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):  # its writer has just renamed it
            changed = max(changed, one.lstat().st_mtime)
    return changed


def _host() -> str:
    """Return this machine's name in the characters that a file's name can have."""
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40] or "-"


@contextmanager
def spelled(folder: Path) -> Iterator[Path]:
    """Yield a folder under a name that is UTF-8, if need be a temporary link, for safetensors."""
    if _is_utf8(folder):
        yield folder
        return
    with TemporaryDirectory() as home:
        link = Path(home) / "folder"
        link.symlink_to(folder.absolute())
        yield link


def require_spelled(folder: Path) -> None:
    """Raise UserError for a folder whose name is not UTF-8: its weights cannot be opened."""
    if not _is_utf8(folder):
        raise UserError(
            f"the name of the folder {folder} is not UTF-8, and safetensors cannot open files "
            "under such a name. Rename it, or make a link with another name and use that."
        )


def _is_utf8(folder: Path) -> bool:
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Does nothing for folders that cannot be synced, as on network and FUSE file systems.
    """
    passed_over = _CANNOT_SYNC_FOLDERS if path.is_dir() else _CANNOT_SYNC
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in passed_over:
            raise


def sync_open(descriptor: int) -> None:
    """Wait until an open file's content is on disk, if its file system can sync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _error_number(error: Exception) -> int | None:
    """Return the system's number in a library's message: "(os error 28)" of safetensors."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
