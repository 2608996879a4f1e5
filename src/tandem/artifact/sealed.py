"""JSON objects that are read back: checked for their keys and types, and sealed by a checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.artifact.files import read_json
from tandem.artifact.hashing import hash_json
from tandem.errors import UserError

CHECKSUM = "checksum"
"""The key of an object's checksum, which counts all its other keys."""

_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
}


class Damaged(UserError):  # noqa: N818 - what a file is
    """A file that is there and is not as it was written."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object as JSON gives it back, with a checksum over all of it."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return {**plain, CHECKSUM: hash_json(plain)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its checksum.

    Objects that were written before there were checksums have none, and are taken as they are.

    Raises ValueError for a checksum that does not fit.
    """
    plain = {key: inner for key, inner in value.items() if key != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != hash_json(plain):
        raise ValueError("its checksum does not fit: it was damaged, or changed by hand")
    return plain


def read_object(path: Path, kinds: Mapping[str, type], way_out: str) -> dict[str, Any]:
    """The JSON object in a file, without its checksum.

    Args:
        path: the file.
        kinds: the keys that it must have, and the types of their values.
        way_out: what a user can do about a damaged file, as a sentence.

    Raises Damaged, which names the file and the key, for anything else than such an object.
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
        found = type(value[key])
        if not issubclass(found, kind) or (found is bool and kind is int):
            raise ValueError(f"{key!r} is {_named(found)}, not {_named(kind)}")


def _named(kind: type) -> str:
    return "null" if kind is type(None) else _WORDS.get(kind, "a number")
