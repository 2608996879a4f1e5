"""Hash the content of files, folders of weights and plain values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.storage.atomic_files import HALVES, read_json
from tandem.storage.known_hashes import known_hash

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_AT_ONCE = 8  # files that are hashed at the same time


def hash_bytes(*parts: bytes) -> str:
    """Return the SHA-256 of the parts, each preceded by its length so that boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """Return what `hash_file` returns for a file with this text."""
    return hashlib.sha256(text.encode("utf-8", errors=HALVES)).hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a plain value's canonical JSON."""
    return hash_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors=HALVES))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    A file that is unchanged is read once in a process, and a large one once altogether: see
    `known_hashes`.
    """
    stat = path.stat()
    return _hash_file(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_file(path: str, _size: int, _mtime_ns: int) -> str:
    return known_hash(Path(path), _digest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_each(paths: Iterable[Path]) -> list[str]:
    """Return the hash of each file; several processors read several files at once."""
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, _AT_ONCE)) as pool:
        return list(pool.map(hash_file, paths))


def hash_files(paths: Iterable[Path]) -> str:
    """Return one hash of several files' names and contents, in name order."""
    listed = list(paths)
    names = (path.name for path in listed)
    return hash_json(sorted(zip(names, hash_each(listed), strict=True)))


def weight_files(folder: Path, *, named: Collection[str] | None = None) -> list[Path]:
    """Return the files, by name, that transformers and peft load weights from, and no others.

    For a model that is the file that config.json names as `transformers_weights`, else
    `model.safetensors`, else what `model.safetensors.index.json` names. Makers put the same weights
    beside them in other formats, and an index may be left from another download.

    Args:
        folder: with config.json and the index, if there is one.
        named: the files' names, where the large ones are not in the folder yet.

    Raises UserError when there are none, or one that the index names is missing.
    """
    if (folder / "adapter_config.json").exists():
        return [_adapter_file(folder)]
    there = _Names(folder, named)
    if (index := _index(folder, there)) is not None:
        return _shards(folder, index, there)
    single = _named_weights(folder) or _SINGLE
    if single in there:
        return [folder / single]
    if others := there.safetensors():
        raise UserError(
            f"{folder} has no {single}, and no {_INDEX} that names its files "
            f"({', '.join(others[:3])}): transformers would load none of them. Copy or download "
            "the missing file."
        )
    raise UserError(
        f"{folder} has no *.safetensors weights. Convert older formats first by loading the "
        "model with transformers and calling save_pretrained."
    )


def weight_index(folder: Path) -> Path | None:
    """Return the index of a model's weights, which says which file has which, if there is one."""
    return _index(folder, _Names(folder, None))


def hash_weights(folder: Path) -> str:
    """Return the hash of the weights of a local model or adapter; see `weight_files`."""
    return hash_files(weight_files(folder))


class _Names:
    """The names of a folder's files, or of those that will be fetched into it."""

    def __init__(self, folder: Path, named: Collection[str] | None) -> None:
        self._folder, self._named = folder, named

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).is_file() if self._named is None else name in self._named

    def safetensors(self) -> list[str]:
        """Return the names of the safetensors files at its root."""
        names = self._named
        if names is None:
            names = [file.name for file in self._folder.iterdir()]
        return sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)


def _index(folder: Path, there: _Names) -> Path | None:
    named = _named_weights(folder)
    if named.endswith(".index.json"):
        return folder / named
    if named or _SINGLE in there or _INDEX not in there:
        return None
    return folder / _INDEX


def _named_weights(folder: Path) -> str:
    """Return the file with weights that config.json names; empty where it names none."""
    try:
        return str(read_json(folder / "config.json").get("transformers_weights") or "")
    except (OSError, ValueError, AttributeError):  # the configuration's reader reports it
        return ""


def _shards(folder: Path, index: Path, there: _Names) -> list[Path]:
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}). Copy or download it again.") from None
    if not names:
        raise UserError(f"{index} names no file with weights. Copy or download it again.")
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{folder} lacks {missing[0]}, which {index.name} names. Copy or download it again."
        )
    return [folder / name for name in names]


def _adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has no adapter_model.safetensors: its training is not finished, or it was "
        "copied in part"
    )


CHECKSUM = "checksum"  # the key of an object's checksum over all its other keys
_WORDS = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false",
}  # fmt: skip


class Damaged(UserError):  # noqa: N818 - what a file is
    """A file was changed after it was written."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as JSON gives it back, with a checksum over all of it."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return {**plain, CHECKSUM: hash_json(plain)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without its checksum, which objects of earlier versions do not have.

    Raises ValueError for a checksum that does not fit.
    """
    plain = {key: inner for key, inner in value.items() if key != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != hash_json(plain):
        raise ValueError("its checksum does not fit: it was damaged, or changed by hand")
    return plain


def read_object(path: Path, kinds: Mapping[str, type], way_out: str) -> dict[str, Any]:
    """Return the JSON object in a file, without its checksum.

    `kinds` has the keys that it must have and the types of their values; `way_out` is a sentence
    for the user. Raises Damaged, with the file and the key, for anything but such an object.
    """
    try:
        value = read_json(path)
        _check(value, kinds)
        return unsealed(value)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}). {way_out}") from None
    except RecursionError:
        raise Damaged(f"{path} cannot be read (it is nested too deeply). {way_out}") from None
    except ValueError as error:
        raise Damaged(f"{path} cannot be read ({error}). {way_out}") from None


def _check(value: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_named(type(value))}, not an object")
    for key, kind in kinds.items():
        if key not in value:
            raise ValueError(f"it has no key {key!r}")
        actual = type(value[key])
        if not issubclass(actual, kind) or (actual is bool and kind is int):
            raise ValueError(f"{key!r} is {_named(actual)}, not {_named(kind)}")


def _named(kind: type) -> str:
    return "null" if kind is type(None) else _WORDS.get(kind, "a number")
