"""Finished measurements on disk, one file each, found again by what they depend on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.storage.atomic_files import atomic_write_json
from tandem.storage.hashing import Damaged, hash_json, read_object, sealed


@dataclass(frozen=True)
class Kept:
    """A folder of measurements: what is finished is not measured again after a kill.

    `log` is told of a damaged file, whose measurement is made again.
    """

    folder: Path
    log: Callable[[str], None] = lambda _: None

    def find(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept under a key, None if nothing was.

        A file that is damaged, or was kept under another key, counts as nothing.

        Raises Damaged for a folder in the file's place.
        """
        path = self._path(name, key)
        if not path.exists():
            return None
        try:
            found = read_object(path, {"key": dict, "result": dict}, "It is measured again.")
        except Damaged as error:
            if path.is_dir():
                raise Damaged(f"{path} is a folder, and a file belongs there. Remove it.") from None
            self.log(str(error))
            return None
        result: dict[str, Any] = found["result"]
        return result if found["key"] == _plain(key) else None

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a finished measurement; a reader sees all of it or nothing."""
        value = {"name": name, "key": _plain(key), "result": dict(result)}
        atomic_write_json(self._path(name, key), sealed(value))

    def _path(self, name: str, key: Mapping[str, Any]) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", name)[:80]
        return self.folder / f"{readable}-{hash_json(_plain(key))[:16]}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    # Tuples are lists in a file.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in key.items()}
