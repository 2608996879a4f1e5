"""Where a command may write."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError


def output_folder(path: Path, name: str) -> Path:
    """The folder that a command is to write into, `~` resolved; it need not exist yet.

    Args:
        path: the folder.
        name: the flag or key that says it, for the message.

    Raises UserError if it, or what should hold it, is a file.
    """
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {path}: {error} Name another folder") from error
    for place in (path, *path.parents):
        if place.is_dir():
            break
        if place.exists():
            raise UserError(f"{name}: {place} is a file, not a folder; name another folder")
    return path
