"""Writes a safetensors file one tensor at a time, in any order, and reads back what it wrote."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tandem.storage.atomic_files import sync_open

_METADATA = {"format": "pt"}
_PIECE = 1 << 18  # bytes that are read back at once
# Bytes after which the disk is waited for, so that it works from the start.
_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class TensorKind:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers take."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """An open file of the bytes that safetensors' `save_file` would write.

    It has its full size from the start, and no more than one tensor is in memory. Several threads
    may write, each its own tensors.
    """

    def __init__(self, path: Path, kinds: Mapping[str, TensorKind]) -> None:
        self.path = path
        self._kinds = dict(kinds)
        self._missing = set(kinds)
        header, self._offsets, size = _layout(self._kinds)
        self._file = path.open("w+b", buffering=0)
        self._file.truncate(size)
        self._write_at(0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        self._unsynced = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; raises ValueError for one of another kind than was announced."""
        kind = TensorKind(tuple(tensor.shape), tensor.dtype)
        if kind != self._kinds[name]:
            raise ValueError(f"{name} was announced as {self._kinds[name]} and is {kind}")
        self._write_at(self._offsets[name], _bytes_of(tensor))
        self._missing.discard(name)
        self._unsynced += kind.nbytes
        if self._unsynced >= _AT_ONCE:
            self._unsynced = 0
            sync_open(self._file.fileno())

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether the file gives back a tensor's bytes under a name."""
        piece = torch.empty(_PIECE, dtype=torch.uint8)
        place = self._offsets[name]
        for expected in _bytes_of(tensor).split(_PIECE):
            found = piece[: len(expected)]
            if os.preadv(self._file.fileno(), [found.numpy().data], place) != len(found):
                return False
            if not torch.equal(found, expected):
                return False
            place += len(found)
        return True

    def check_whole(self) -> None:
        """Raise ValueError if a tensor was never written."""
        if self._missing:
            raise ValueError(f"{self.path} lacks {sorted(self._missing)[0]}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_at(self, place: int, values: Tensor) -> None:
        """Write bytes at a place in the file; the system may take a part at a time."""
        left = values.numpy().data
        while len(left):
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written


def _layout(kinds: Mapping[str, TensorKind]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file, where each tensor begins in it, and its size in bytes."""
    # safetensors orders tensors by dtype and name, whatever their sizes.
    samples = {name: torch.empty(1, dtype=kind.dtype) for name, kind in kinds.items()}
    encoded = save(samples, metadata=_METADATA)
    (length,) = struct.unpack_from("<Q", encoded)
    values = json.loads(encoded[8 : 8 + length])
    offsets, end = {}, 0
    for name in values:  # in the order of the file
        if name in kinds:
            offsets[name], end = end, end + kinds[name].nbytes
            values[name] |= {"shape": kinds[name].shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: start + offset for name, offset in offsets.items()}, start + end


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor, as bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
