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
# UTF-8 cannot encode them. They are written as JSON escapes, and reading turns these back.
HALVES = "backslashreplace"
# What file systems answer that cannot do this; the data is as safe as they keep any.
_CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
# And those that do not let folders be opened, or synced when they are.
_CANNOT_SYNC_FOLDERS = _CANNOT_SYNC | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


# Half-written files: the final name, the machine that writes them (older versions left it out) and
# the process.
_ASIDE = re.compile(r"\..+\.(?:(?P<host>[\w-]+)@)?(?P<process>\d+)\.tmp")
# Seconds after which a half-written file of another machine is nobody's.
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
    """A file to write; when the block ends without an error it becomes `path`.

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
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path, way_out: str = "Copy or download it again.") -> dict[str, Any]:
    """The JSON object in a file that another program wrote.

    Raises UserError, with the way out, for a file that holds none.
    """
    try:
        found = read_json(path)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. {way_out}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object. {way_out}")
    return found


def append_jsonl(path: Path, value: Any) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8", errors=HALVES) as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON lines file; an unfinished last line (a killed writer's) is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends without an error it becomes `path`.

    Files are synced before the rename, so a folder under its final name is complete even after
    a power cut. An existing `path` is replaced. They get the rights that any new file gets here,
    whatever library wrote them: safetensors lets nobody else read its files.

    Raises OSError for what the disk refused, also where a library says so in an error of its own.
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
    """Where this process writes what becomes `path` when it is whole."""
    return path.with_name(f".{path.name}.{_host()}@{os.getpid()}.tmp")


def remove_left_behind(folder: Path) -> None:
    """Remove half-written files, in a folder and its folders, whose processes are gone.

    The caller must not be writing there. A process of another machine cannot be looked up: its
    files count as left behind when nothing in them has changed for a day.
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
    """Whether somebody may still be writing a file or folder."""
    if host != _host():
        return time.time() - _last_change(path) < _ABANDONED_SECONDS
    if process == os.getpid():  # a container gives each of its lives the same number
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's, and alive
        return True
    return True


def _last_change(path: Path) -> float:
    changed = 0.0
    for one in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):  # it is written just now
            changed = max(changed, one.lstat().st_mtime)
    return changed


def _host() -> str:
    """This machine's name, as far as a file's name can hold it."""
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40] or "-"


@contextmanager
def spelled(folder: Path) -> Iterator[Path]:
    """A folder under a name that is UTF-8, for libraries that take no other.

    It is the folder itself where it can be, else a link to it that is gone afterwards.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as home:
            link = Path(home) / "folder"
            link.symlink_to(folder.absolute())
            yield link
    else:
        yield folder


def require_spelled(folder: Path) -> None:
    """Raise UserError for a folder whose name is not UTF-8: its weights cannot be opened."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the name of the folder {folder} is not UTF-8, and safetensors cannot open files "
            "under such a name. Rename it, or make a link with another name and use that."
        ) from None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Folders that cannot be synced are passed over: network and FUSE file systems have such.
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
    """Wait until an open file's content is on disk, where its file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _error_number(error: Exception) -> int | None:
    """The operating system's number in a library's message: "(os error 28)" of safetensors."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None
