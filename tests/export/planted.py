"""Mistakes that are put into a copy of a GGUF file, in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np


def changed_copy(file: Path, folder: Path) -> tuple[Path, Any]:
    """A copy of a file, and gguf's reader of it, through which it can be written to."""
    from gguf import GGUFReader

    copy = folder / "planted.gguf"
    shutil.copyfile(file, copy)
    return copy, GGUFReader(copy, "r+")


def plant_value(reader: Any, key: str, value: float) -> None:
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value


def plant_text(reader: Any, key: str, old: bytes, new: bytes) -> None:
    """Replace a part of a text by one of the same length."""
    field = reader.fields[key]
    part = field.parts[field.data[0]]
    place = bytes(part).index(old)
    assert len(old) == len(new)
    part[place : place + len(new)] = np.frombuffer(new, dtype=np.uint8)


def plant_rows(reader: Any, name: str, order: Any) -> None:
    """Put the rows of a tensor into another order."""
    tensor = next(one for one in reader.tensors if one.name == name)
    tensor.data[:] = np.array(tensor.data)[order]
