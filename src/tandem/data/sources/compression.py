"""Read files compressed with gzip or zstd; refuse files that are not what their name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tandem.errors import UserError

COMPRESSED = (".gz", ".zst")
_BLOCK = 2**20
_GZIP_WINDOW = 31  # zlib's number for the largest window, in a gzip wrapper


class BrokenStream(Exception):  # noqa: N818  (not raised to users: readers make a bad row of it)
    """A compressed file that cannot be read to its end; the message says why."""


def kind_of(file: Path) -> str:
    """Return a file's suffix in lower case without compression: `.jsonl` for `a.jsonl.gz`."""
    inner = file.with_suffix("") if is_compressed(file) else file
    return inner.suffix.lower()


def is_compressed(file: Path) -> bool:
    """Return whether a file is compressed, by its name."""
    return file.suffix.lower() in COMPRESSED


def kind_of_text(file: Path) -> str:
    """Return the same for texts that `open_text` opens, in whatever order the suffixes stand."""
    names = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _TEXT_OPENERS]
    return names[-1] if names else ""


def open_text(file: Path) -> IO[str]:
    """Open a file of plain lines, compressed or not; what is not UTF-8 is replaced.

    Raises OSError, and while it is read what the decompressors raise.
    """
    opened: IO[str] = _TEXT_OPENERS.get(file.suffix.lower(), Path.open)(
        file, "rt", encoding="utf-8-sig", errors="replace", newline=""
    )
    return opened


def _open_zstd(file: Path, _mode: str, **how: Any) -> IO[str]:
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), **how)


_TEXT_OPENERS: dict[str, Any] = {
    ".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstd,
}  # fmt: skip


def read_blocks(file: Path) -> Iterator[bytes]:
    """Yield a file's content in blocks of up to 1 MiB, decompressed if its name says so.

    Raises `BrokenStream` after the last readable byte of a damaged or truncated file, and OSError
    for one that the system does not give.
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
    """Yield the members of a gzip file one after the other; zeros behind the last are padding."""
    with file.open("rb") as content:
        member = zlib.decompressobj(_GZIP_WINDOW)
        started = False
        while packed := content.read(_BLOCK):
            while packed:
                if not started and not (packed := packed.lstrip(b"\0")):
                    break
                started = True
                try:
                    block = member.decompress(packed, _BLOCK)
                except zlib.error as error:
                    raise BrokenStream(f"the gzip data is damaged: {error}") from error
                if block:
                    yield block
                packed = member.unconsumed_tail
                if member.eof:
                    packed = member.unused_data
                    member, started = zlib.decompressobj(_GZIP_WINDOW), False
        if started:
            raise BrokenStream("the gzip data is cut off")


def _zstd(file: Path) -> Iterator[bytes]:
    import pyarrow

    # Opened here, so that the system's errors are not taken for damage of the data.
    with file.open("rb") as content:
        if not content.read(1):
            return
        content.seek(0)
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(content), "zstd") as stream:
            try:
                while block := bytes(stream.read(_BLOCK // 16)):
                    yield block
            except (OSError, pyarrow.ArrowException) as error:
                raise BrokenStream(f"the zstd data is damaged or cut off: {error}") from error


_GZIP, _ZSTD, _PARQUET, _ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"
_UNPACK = "Unpack it, and name what is in it."
_EXPORT = "Export its rows as JSON lines, CSV or Parquet."
_KINDS: dict[bytes, tuple[str, str]] = {
    _GZIP: ("a gzip file", "Let its name end in .gz."),
    _ZSTD: ("a zstd file", "Let its name end in .zst."),
    _PARQUET: ("a Parquet file", "Let its name end in .parquet."),
    _ARROW: ("an Arrow file", "Let its name end in .arrow."),
    b"PK\x03\x04": ("a ZIP archive or an office document", _UNPACK),
    b"BZh": ("a bzip2 file", _UNPACK),
    b"\xfd7zXZ": ("an xz file", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"\xd0\xcf\x11\xe0": ("an office document", _EXPORT),
    b"SQLite format 3": ("an SQLite database", _EXPORT),
    b"%PDF": ("a PDF document", _EXPORT),
    b"\x93NUMPY": ("a NumPy array", _EXPORT),
    b"\x89HDF": ("an HDF5 file", _EXPORT),
    b"Obj\x01": ("an Avro file", _EXPORT),
    b"PARE": ("an encrypted Parquet file", "Write it without encryption."),
}
_EXPECTED = {".gz": _GZIP, ".zst": _ZSTD, ".parquet": _PARQUET, ".arrow": _ARROW}
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def check_signature(file: Path) -> None:
    """Raise `UserError` for a file that is not what its name says; OSError if it cannot be read."""
    with file.open("rb") as content:
        start = content.read(2**16)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        raise _is(file, "a Git LFS pointer, not the data", "Fetch the data with `git lfs pull`.")
    if text[:16].lower().startswith(_PAGES):
        page = "a web page (HTML or XML), as a login or an error answers"
        raise _is(file, page, "Download the data again, logged in, or from its raw address.")
    suffix = file.suffix.lower()
    for magic, (what, way_out) in _KINDS.items():
        if start.startswith(magic) and _EXPECTED.get(suffix) != magic:
            raise _is(file, what, way_out)
    if suffix in _EXPECTED:
        if text.startswith((b"{", b"[{", b"[\n")):
            plain = file.name.removesuffix(file.suffix) if is_compressed(file) else "a name"
            ends = "" if is_compressed(file) else " that ends in .jsonl or .json"
            raise _is(file, "plain JSON", f"Rename it to {plain}{ends}.")
        return
    _check_text(file, start, text)


def _check_text(file: Path, start: bytes, text: bytes) -> None:
    wide = "UTF-32" if start.startswith(_UTF32) else "UTF-16"
    if start.startswith((*_UTF32, *_UTF16)) or (len(start) > 3 and start[:4].count(0) == 2):
        what = f"{wide} text, which some editors and spreadsheets call Unicode"
        raise _is(file, what, f"Save it as UTF-8 (`iconv -f {wide} -t UTF-8 FILE > NEW`).")
    only_returns = b"\r" in text.rstrip() and b"\n" not in start
    if only_returns and not (kind_of(file) != ".csv" and text.startswith(b"[")):
        what = "a text whose lines end in carriage returns alone"
        raise _is(file, what, "Save it with line feeds (`tr '\\r' '\\n' < FILE > NEW`).")


def _is(file: Path, what: str, way_out: str) -> UserError:
    return UserError(f"data: {file} is {what}. {way_out}")
