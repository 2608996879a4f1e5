"""Finished measurements on disk, one file each, found again by what they depend on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.artifact.files import atomic_write_json, read_json
from tandem.artifact.hashing import hash_json


@dataclass(frozen=True)
class Kept:
    """A folder of measurements: what is finished is not measured again after a kill."""

    folder: Path

    def find(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept under a key, None if nothing was.

        A file that cannot be read, or was kept under another key, counts as nothing.
        """
        try:
            found = read_json(self._path(name, key))
            result = found["result"] if found["key"] == _plain(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if isinstance(result, dict) else None

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a finished measurement; a reader sees all of it or nothing."""
        value = {"name": name, "key": _plain(key), "result": dict(result)}
        atomic_write_json(self._path(name, key), value)

    def _path(self, name: str, key: Mapping[str, Any]) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", name)[:80]
        return self.folder / f"{readable}-{hash_json(_plain(key))[:16]}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    # Tuples are lists in a file.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in key.items()}
