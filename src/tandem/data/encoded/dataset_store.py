"""What encoded data depends on, as one key; where the data lies is no part of it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tandem.data.encoded.dataset import Bytes, EncodedDataset, Index
from tandem.data.encoded.encode_chunk import EncodedChunk, EncodingOptions
from tandem.data.ledger import Entry, Ledger
from tandem.data.sources.compression import is_compressed, kind_of
from tandem.data.sources.rows import data_files, load_hub, looks_like_path
from tandem.data.tokenize.codec import CodecParts
from tandem.storage.atomic_files import HALVES, atomic_folder, read_json
from tandem.storage.cache_folder import cache_folder, prune_folders, remove
from tandem.storage.hashing import Damaged, hash_file, hash_json, read_object, sealed

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource

# Changes whenever the same records, tokenizer and limits would give other ids, masks or entries, or
# more is kept of them.
_ENCODER = 7


def encoding_key(
    sources: Sequence[DataSource], parts: CodecParts, options: EncodingOptions
) -> str | None:
    """The key of what options make of some sources, or None when a source cannot be identified.

    Local files count by content and kind, data sets of the Hub by the files that `datasets` keeps
    of them, and both by what the recipe says of their formats and names.
    Raises `UserError` as reading the sources would.
    """
    contents = [_content(source) for source in sources]
    if any(content is None for content in contents):
        return None
    return hash_json(
        {
            "encoder": _ENCODER,
            "codec": parts.identity,
            "kind": options.kind,
            "limits": [options.limits.sequence, options.limits.prompt, options.limits.too_long],
            "loss_on": options.loss_on,
            "on_bad_record": options.on_bad_record,
            "sources": contents,
            "meanings": [source.meaning for source in sources],
        }
    )


def _content(source: DataSource) -> list[Any] | None:
    if looks_like_path(source.path):
        saved, files = data_files(source)
        try:
            return [saved, [[_kind(file), hash_file(file)] for file in files]]
        except OSError:  # reading says what is wrong with it
            return None
    table = load_hub(source)
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return None
    return [source.split, len(table), [hash_file(Path(file)) for file in files]]


def _kind(file: Path) -> str:
    """What a file's name says about how it is read."""
    return kind_of(file) + (file.suffix.lower() if is_compressed(file) else "")


# Everything an entry holds beside entry.json. Ids are little-endian, like everything here.
_DTYPES = {
    "parts": "<i4", "lengths": "<i4", "targets": "<i4", "fed": "<i4", "rows": "<i8", "files": "<i4",
    "prompts": "<u8",
}  # fmt: skip
_COLUMNS = (*_DTYPES, "ids", "trained", "digests")
_LEDGER = "ledger"
_BYTES_LIMIT = 20 * 2**30
_BLOCK = 2**22
# What entry.json holds.
_KINDS = {"sources": list, "formats": dict, "unread": dict, "files": dict}
# What reading a damaged entry leads to.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, Damaged)


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry that was found: its dataset, and what the ledger was told when it was made."""

    dataset: EncodedDataset
    entries: list[Entry]
    formats: dict[int, str]
    unread: dict[int, tuple[str, ...]]

    def ledger(self, paths: Sequence[str]) -> Ledger:
        """The ledger of the sources at `paths`."""
        ledger = Ledger(None)
        for number, name in self.formats.items():
            ledger.detected(paths[number], name, self.unread.get(number, ()))
        ledger.add(self.entries, len(self.dataset))
        return ledger


class DatasetWriter:
    """Takes encoded chunks in reading order, and gives their examples back.

    They go into files of `folder`, or into memory; records come from files called `names`.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = tuple(names)
        self._numbers = {name: number for number, name in reversed(list(enumerate(names)))}
        self._sinks: dict[str, _Sink] = {
            name: _Sink(None if folder is None else folder / name) for name in (*_COLUMNS, _LEDGER)
        }
        self._bits = np.zeros(0, dtype=np.bool_)
        self.records = 0
        self._sources: tuple[int, ...] = ()

    def add(self, batch: EncodedChunk) -> None:
        """Append a batch's examples and ledger lines."""
        arrays = batch.arrays
        count = len(arrays.parts)
        bits = np.concatenate([self._bits, arrays.trained])
        whole = len(bits) // 8 * 8
        self._bits = bits[whole:]
        self._put("trained", np.packbits(bits[:whole]))
        self._put("files", np.full(count, self._numbers[batch.file]))
        self._put("ids", arrays.ids.astype("<i4", copy=False))
        self._put("digests", arrays.digests)
        for name in ("parts", "lengths", "targets", "fed", "rows", "prompts"):
            self._put(name, getattr(arrays, name))
        for entry in batch.entries:
            line = [self._numbers[entry.file], entry.row, entry.outcome, entry.reason, entry.detail]
            self._sinks[_LEDGER].write(
                json.dumps(line, ensure_ascii=False).encode(errors=HALVES) + b"\n"
            )
        self.records += count

    def finish(
        self,
        formats: Mapping[int, str],
        sources: Sequence[int],
        unread: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Complete the columns; nothing may be added after that.

        `formats` are names of formats and `unread` keys that are not read, by source; `sources`
        are how many records each source gave.
        """
        self._sources = tuple(sources)
        self._put("trained", np.packbits(self._bits))
        self.close()
        if self._folder is not None:
            about = {
                "records": self.records,
                "sources": self._sources,
                "formats": {str(source): name for source, name in formats.items()},
                "unread": {str(source): list(keys) for source, keys in unread.items()},
                "files": {name: [sink.size, sink.crc] for name, sink in self._sinks.items()},
            }
            (self._folder / "entry.json").write_text(json.dumps(sealed(about), indent=2) + "\n")

    def close(self) -> None:
        """Close the columns' files, complete or not."""
        for sink in self._sinks.values():
            sink.close()

    def dataset(self) -> EncodedDataset:
        """What was added, of a writer to memory."""
        memory = {name: sink.memory for name, sink in self._sinks.items()}
        arrays = {name: np.frombuffer(memory[name], dtype=dtype) for name, dtype in _DTYPES.items()}
        index: Any = Index(**arrays, names=self._names, sources=self._sources)
        ids, trained, digests = (Bytes(memory[name]) for name in ("ids", "trained", "digests"))
        return EncodedDataset(index, ids, trained, digests)

    def _put(self, name: str, values: NDArray[Any]) -> None:
        dtype = _DTYPES.get(name)
        self._sinks[name].write((values if dtype is None else values.astype(dtype)).tobytes())


class EncodedStore:
    """The encoded data sets in `folder`, by default the cache folder's `encoded`.

    `log` is told when an entry is damaged, or cannot be kept.
    """

    def __init__(self, log: Callable[[str], None], folder: Path | None = None) -> None:
        self.log = log
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the entries are; raises OSError for an account without a home folder."""
        return self._folder or cache_folder() / "encoded"

    def find(self, key: str, names: Sequence[str]) -> Kept | None:
        """The entry of that key, its files now called `names`; None when there is no sound one."""
        try:
            entry = self.folder / key
            if not entry.exists():
                return None
        except OSError:  # `writing` says why it cannot be reached
            return None
        try:
            about = read_object(entry / "entry.json", _KINDS, "")
            for name in (*_COLUMNS, _LEDGER):
                _check(entry / name, *about["files"][name])
            formats = {int(source): name for source, name in about["formats"].items()}
            unread = {int(source): tuple(keys) for source, keys in about["unread"].items()}
            dataset = _open(entry, names, about["sources"])
            found = Kept(dataset, _ledger_lines(entry, names), formats, unread)
            with suppress(OSError):  # a cache that may only be read
                os.utime(entry)
        except _DAMAGE as error:
            self.log(f"the encoded data in {entry} is damaged ({error}): encoding it again")
            with suppress(OSError):
                remove(entry)
            return None
        return found

    @contextmanager
    def writing(self, key: str, names: Sequence[str]) -> Iterator[DatasetWriter]:
        """A writer whose examples become the entry when the block ends without an error."""
        with atomic_folder(self.folder / key) as aside:
            writer = DatasetWriter(aside, names)
            try:
                yield writer
            finally:
                writer.close()

    def dataset(self, key: str, names: Sequence[str]) -> EncodedDataset:
        """The examples of an entry that was just written."""
        about = read_json(self.folder / key / "entry.json")
        return _open(self.folder / key, names, about["sources"])

    def prune(self, key: str, limit_bytes: int = _BYTES_LIMIT) -> int:
        """Forget the longest unused entries beyond the limit, but not `key`'s; returns how many."""
        return prune_folders(self.folder, limit_bytes, keep=self.folder / key)


def _open(entry: Path, names: Sequence[str], sources: Sequence[int]) -> EncodedDataset:
    arrays = {name: np.fromfile(entry / name, dtype=dtype) for name, dtype in _DTYPES.items()}
    index: Any = Index(**arrays, names=tuple(names), sources=tuple(sources))
    ids, trained, digests = (Bytes(entry / name) for name in ("ids", "trained", "digests"))
    return EncodedDataset(index, ids, trained, digests)


def _ledger_lines(entry: Path, names: Sequence[str]) -> list[Entry]:
    with (entry / _LEDGER).open(encoding="utf-8") as lines:
        return [Entry(names[file], *rest) for file, *rest in (json.loads(line) for line in lines)]


def _check(file: Path, size: int, crc: int) -> None:
    if file.stat().st_size != size:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {size}")
    found = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            found = zlib.crc32(block, found)
    if found != crc:
        raise ValueError(f"the checksum of {file.name} differs")


class _Sink:
    """A growing file, or bytes in memory, with its size and checksum."""

    def __init__(self, path: Path | None) -> None:
        self.memory = bytearray()
        self.size = 0
        self.crc = 0
        self._file: BinaryIO | None = None if path is None else path.open("wb")

    def write(self, content: bytes) -> None:
        if self._file is None:
            self.memory += content
            return
        self._file.write(content)
        self.size += len(content)
        self.crc = zlib.crc32(content, self.crc)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
