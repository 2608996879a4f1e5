"""Files that are either whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandem.errors import UserError

# For half characters, as in file names that are no UTF-8, and which UTF-8 cannot spell: they are
# written as JSON escapes, which reading turns back.
HALVES = "backslashreplace"


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    atomic_write_parts(path, [text])


def atomic_write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write texts one after the other, never all in memory; see `atomic_write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8", errors=HALVES) as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; see `atomic_write_text`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
    a power cut. An existing `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                sync(file)
        sync(aside)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
    """Raise UserError for a folder of a name that is no UTF-8, whose weights nothing can open."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the name of the folder {folder} is no UTF-8, and safetensors opens no file under "
            "such a name. Rename it, or make a link to it under another name, and name that."
        ) from None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
