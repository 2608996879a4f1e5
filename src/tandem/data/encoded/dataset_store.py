"""Keep encoded data on disk, under a key of all that it depends on; the data may lie anywhere."""

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
from tandem.data.read_records import holds_tokens
from tandem.data.sources.compression import is_compressed, kind_of
from tandem.data.sources.rows import data_files, load_hub, looks_like_path
from tandem.data.tokenize.codec import CodecParts
from tandem.storage.atomic_files import HALVES, atomic_folder, read_json
from tandem.storage.cache_folder import cache_folder, prune_folders, remove
from tandem.storage.hashing import Damaged, hash_file, hash_json, read_object, sealed

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource

# Raised whenever the same records, tokenizer and limits would give other content of an entry.
_ENCODER = 7


def encoding_key(
    sources: Sequence[DataSource], parts: CodecParts, options: EncodingOptions
) -> str | None:
    """Return the key of some sources' encoded data, or None when a source cannot be identified.

    Local files count by content and kind, data sets of the Hub by the files that `datasets` keeps
    of them, both by what the recipe says of formats and names. Raises `UserError` as reading does.
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
            **_rows(sources, parts, options),
        }
    )


def _rows(
    sources: Sequence[DataSource], parts: CodecParts, options: EncodingOptions
) -> dict[str, int]:
    """Return the model's rows where rows of tokens are compared with them."""
    if parts.all_rows is None or not any(holds_tokens(one, options.kind) for one in sources):
        return {}
    return {"rows": parts.all_rows}


def _content(source: DataSource) -> list[Any] | None:
    if looks_like_path(source.path):
        saved, files = data_files(source)
        try:
            return [saved, [[_kind(file), hash_file(file)] for file in files]]
        except OSError:  # reading reports what is wrong with it
            return None
    table = load_hub(source)
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return None
    return [source.split, len(table), [hash_file(Path(file)) for file in files]]


def _kind(file: Path) -> str:
    """Return the suffixes of a file, which decide how it is read."""
    return kind_of(file) + (file.suffix.lower() if is_compressed(file) else "")


# The files of an entry beside entry.json. All numbers are little-endian.
_DTYPES = {
    "parts": "<i4", "lengths": "<i4", "targets": "<i4", "fed": "<i4", "rows": "<i8", "files": "<i4",
    "prompts": "<u8", "scores": "<f8",
}  # fmt: skip
# Entries of earlier versions lack these, which are then empty.
_LATER = ("scores",)
_COLUMNS = (*_DTYPES, "ids", "trained", "digests")
_LEDGER = "ledger"
_BYTES_LIMIT = 20 * 2**30
_BLOCK = 2**22
# The keys of entry.json.
_KINDS = {"sources": list, "formats": dict, "unread": dict, "files": dict}
# What reading a damaged entry raises.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, Damaged)


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry of the store: its dataset, and what the ledger recorded when it was made."""

    dataset: EncodedDataset
    entries: list[Entry]
    formats: dict[int, str]
    unread: dict[int, tuple[str, ...]]

    def ledger(self, paths: Sequence[str]) -> Ledger:
        """Return the ledger of the sources at `paths`."""
        ledger = Ledger(None)
        for number, name in self.formats.items():
            ledger.detected(paths[number], name, self.unread.get(number, ()))
        ledger.add(self.entries, self.dataset.records)
        return ledger


class DatasetWriter:
    """Writes encoded chunks in reading order into files of `folder`, or into memory.

    The records come from files called `names`.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = tuple(names)
        self._numbers = {name: number for number, name in reversed(list(enumerate(names)))}
        self._sinks: dict[str, _Sink] = {
            name: _Sink(None if folder is None else folder / name) for name in (*_COLUMNS, _LEDGER)
        }
        self._bits = np.zeros(0, dtype=np.bool_)
        self._unscored = 0  # sequences at the end that no scores were written of
        self._scored = False
        self.records = 0  # their examples
        self._whole = 0
        self._sources: tuple[int, ...] = ()

    def add(self, batch: EncodedChunk) -> None:
        """Append a chunk's examples and ledger lines."""
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
        self._unscored += len(arrays.digests)
        if len(arrays.scores):
            self._unscored -= len(arrays.scores)
            self._fill_scores()
            self._put("scores", arrays.scores)
            self._scored = True
        for entry in batch.entries:
            line = [self._numbers[entry.file], entry.row, entry.outcome, entry.reason, entry.detail]
            self._sinks[_LEDGER].write(
                json.dumps(line, ensure_ascii=False).encode(errors=HALVES) + b"\n"
            )
        self.records += count
        self._whole += batch.trained

    def finish(
        self,
        formats: Mapping[int, str],
        sources: Sequence[int],
        unread: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Complete the columns; nothing may be added after that.

        `formats` has the formats' names and `unread` the unread keys, both by source; `sources`
        has the number of records of each source.
        """
        self._sources = tuple(sources)
        if self._scored:
            self._fill_scores()
        self._put("trained", np.packbits(self._bits))
        self.close()
        if self._folder is not None:
            about = {
                "records": self.records,
                **({"whole": self._whole} if self._whole != self.records else {}),
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
        """Return what was added to memory."""
        memory = {name: sink.memory for name, sink in self._sinks.items()}
        arrays = {name: np.frombuffer(memory[name], dtype=dtype) for name, dtype in _DTYPES.items()}
        return _dataset(arrays, memory, self._names, self._sources, self._whole)

    def _fill_scores(self) -> None:
        self._put("scores", np.full(self._unscored, np.nan))
        self._unscored = 0

    def _put(self, name: str, values: NDArray[Any]) -> None:
        dtype = _DTYPES.get(name)
        self._sinks[name].write((values if dtype is None else values.astype(dtype)).tobytes())


class EncodedStore:
    """The encoded data sets in `folder`, by default the cache folder's `encoded`.

    `log` reports an entry that is damaged, or cannot be kept.
    """

    def __init__(self, log: Callable[[str], None], folder: Path | None = None) -> None:
        self.log = log
        self._folder = folder

    @property
    def folder(self) -> Path:
        """The folder of the entries; raises OSError for an account without a home folder."""
        return self._folder or cache_folder() / "encoded"

    def find(self, key: str, names: Sequence[str]) -> Kept | None:
        """Return the entry of a key, its files now called `names`; None without a sound one."""
        try:
            entry = self.folder / key
            if not entry.exists():
                return None
        except OSError:  # `writing` says why it cannot be reached
            return None
        try:
            about = read_object(entry / "entry.json", _KINDS, "")
            for name in (*_COLUMNS, _LEDGER):
                if name in about["files"] or name not in _LATER:
                    _check(entry / name, *about["files"][name])
            formats = {int(source): name for source, name in about["formats"].items()}
            unread = {int(source): tuple(keys) for source, keys in about["unread"].items()}
            dataset = _open(entry, names, about)
            with (entry / _LEDGER).open(encoding="utf-8") as lines:
                rows = map(json.loads, lines)
                entries = [Entry(names[file], *rest) for file, *rest in rows]
            with suppress(OSError):  # a cache that may only be read
                os.utime(entry)
            return Kept(dataset, entries, formats, unread)
        except _DAMAGE as error:
            self.log(f"the encoded data in {entry} is damaged ({error}): encoding it again")
            with suppress(OSError):
                remove(entry)
            return None

    @contextmanager
    def writing(self, key: str, names: Sequence[str]) -> Iterator[DatasetWriter]:
        """Yield a writer whose examples become the entry when the block ends without an error."""
        with atomic_folder(self.folder / key) as aside:
            writer = DatasetWriter(aside, names)
            try:
                yield writer
            finally:
                writer.close()

    def dataset(self, key: str, names: Sequence[str]) -> EncodedDataset:
        """Return the examples of an entry that was just written."""
        about = read_json(self.folder / key / "entry.json")
        return _open(self.folder / key, names, about)

    def prune(self, key: str, limit_bytes: int = _BYTES_LIMIT) -> int:
        """Remove the longest unused entries beyond the limit, except `key`'s; return how many."""
        return prune_folders(self.folder, limit_bytes, keep=self.folder / key)


def _open(entry: Path, names: Sequence[str], about: Mapping[str, Any]) -> EncodedDataset:
    arrays = {
        name: np.fromfile(entry / name, dtype=dtype)
        if name not in _LATER or (entry / name).exists()
        else np.zeros(0, dtype=dtype)
        for name, dtype in _DTYPES.items()
    }
    columns = {name: entry / name for name in _COLUMNS}
    whole = about.get("whole", about["records"])
    return _dataset(arrays, columns, names, about["sources"], whole)


def _dataset(
    arrays: Mapping[str, NDArray[Any]],
    columns: Mapping[str, Any],
    names: Sequence[str],
    sources: Sequence[int],
    whole: int,
) -> EncodedDataset:
    split = whole != len(arrays["parts"])
    index: Any = Index(**arrays, names=tuple(names), sources=tuple(sources), split=split)
    ids, trained, digests = (Bytes(columns[name]) for name in ("ids", "trained", "digests"))
    return EncodedDataset(index, ids, trained, digests)


def _check(file: Path, size: int, crc: int) -> None:
    if file.stat().st_size != size:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {size}")
    actual = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            actual = zlib.crc32(block, actual)
    if actual != crc:
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
