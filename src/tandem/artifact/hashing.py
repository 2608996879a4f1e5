"""Content hashes: what a file, a folder of weights or a plain value is, apart from its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tandem.artifact.files import HALVES
from tandem.errors import UserError


def hash_bytes(*parts: bytes) -> str:
    """SHA-256 of the parts, each preceded by its length so that boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a plain value's canonical JSON."""
    return hash_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors=HALVES))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes; unchanged files are read once per process."""
    stat = path.stat()
    return _hash_file(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_file(path: str, _size: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """One hash of several files' names and contents, in name order."""
    return hash_json(sorted((path.name, hash_file(path)) for path in paths))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors (else bin) files that a model or adapter folder consists of, by name.

    Where there is an index, they are the files it names: makers put the same weights beside them
    in a layout of their own.

    Raises UserError when there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}). Copy or download it again.") from None
        shards = sorted(folder / str(name) for name in named)
        for shard in shards:
            if not shard.exists():
                raise UserError(
                    f"{folder} lacks {shard.name}, which {index.name} names. Copy or download it "
                    "again."
                )
        return shards
    shards = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not shards:
        raise UserError(f"{folder} is no model or adapter folder: it has no *.safetensors weights")
    return shards


def hash_weights(folder: Path) -> str:
    """Hash of the weight bytes of a local model or adapter folder; see `weight_files`."""
    return hash_files(weight_files(folder))
