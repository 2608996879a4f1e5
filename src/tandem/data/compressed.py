"""Files compressed with gzip or zstd, as a stream of bytes that says where it breaks off."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

COMPRESSED = (".gz", ".zst")
_BLOCK = 2**20
_GZIP = 31  # zlib's number for the largest window, in a gzip wrapper


class BrokenStream(Exception):  # noqa: N818  (not raised to users: readers make a bad row of it)
    """A compressed file that cannot be read to its end; the message says why."""


def kind_of(file: Path) -> str:
    """What a file is by its name, compression aside: `.jsonl` for `a.jsonl.gz`."""
    inner = file.with_suffix("") if is_compressed(file) else file
    return inner.suffix.lower()


def is_compressed(file: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return file.suffix.lower() in COMPRESSED


def read_blocks(file: Path) -> Iterator[bytes]:
    """The content of a file in order, in pieces of up to 1 MiB, decompressed if it has to be.

    Raises `BrokenStream` after the last byte that could be had of a damaged or truncated file, and
    OSError for one that the system does not give.
    """
    suffix = file.suffix.lower()
    if suffix == ".gz":
        yield from _gunzip(file)
    elif suffix == ".zst":
        yield from _zstd(file)
    else:
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                yield block


def _gunzip(file: Path) -> Iterator[bytes]:
    """The members of a gzip file one after the other; zeros behind the last are padding."""
    with file.open("rb") as content:
        member = zlib.decompressobj(_GZIP)
        started = False
        while given := content.read(_BLOCK):
            while given:
                if not started and not (given := given.lstrip(b"\0")):
                    break
                started = True
                try:
                    block = member.decompress(given, _BLOCK)
                except zlib.error as error:
                    raise BrokenStream(f"the gzip data is damaged: {error}") from error
                if block:
                    yield block
                given = member.unconsumed_tail
                if member.eof:
                    given = member.unused_data
                    member, started = zlib.decompressobj(_GZIP), False
        if started:
            raise BrokenStream("the gzip data is cut off")


def _zstd(file: Path) -> Iterator[bytes]:
    import pyarrow

    # Opened here, for an error of this file is the system's and one of that stream the data's.
    with file.open("rb") as content:
        if not content.read(1):
            return
        content.seek(0)
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(content), "zstd") as stream:
            while True:
                try:
                    block = bytes(stream.read(_BLOCK // 16))
                except (OSError, pyarrow.ArrowException) as error:
                    raise BrokenStream(f"the zstd data is damaged or cut off: {error}") from error
                if not block:
                    return
                yield block
