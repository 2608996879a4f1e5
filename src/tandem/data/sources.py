"""From a file, a folder or a Hub id to rows that know where they came from.

Rows are streamed: nothing here holds a whole data set as Python objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.records import Origin
from tandem.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# Descriptions that lie beside the data in saved and downloaded data sets.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_PATH_SUFFIXES = (*SUFFIXES, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip", ".bz2")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_PARQUET_BATCH = 256


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A data set to read: a file, a folder or a Hub id, and which part of it."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its file."""

    fields: dict[str, object]
    origin: Origin


@dataclass(frozen=True, slots=True)
class BadLine:
    """A record that could not be parsed, and why."""

    origin: Origin
    reason: str


def looks_like_path(text: str) -> bool:
    """Whether a data set's name means something on disk rather than a Hub id.

    It does when it exists, starts like a path, ends like a data file, has more than one slash,
    lies in a folder that exists, or could not be a Hub id at all. What looks like a path is
    never tried as a Hub id.
    """
    if text.startswith((".", "/", "~")) or text.lower().endswith(("/", *_PATH_SUFFIXES)):
        return True
    if not _HUB_ID.fullmatch(text) or Path(text).exists():
        return True
    return "/" in text and Path(text).parent.is_dir()


def local_files(path: str, split: str = "train") -> list[Path]:
    """The files that a local source consists of, in reading order.

    Raises `UserError` when nothing is there, or nothing that can be read.
    """
    root = _existing(path)
    if root.is_file():
        return [root]
    if saved := _saved_folder(root, split):
        return sorted(file for file in saved.iterdir() if file.suffix in (".arrow", ".json"))
    files = sorted(
        file
        for file in root.rglob("*")
        if file.is_file()
        and file.suffix.lower() in SUFFIXES
        and file.name not in _NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise UserError(f"data: the folder {path} holds no {', '.join(SUFFIXES)} file.")
    chosen = [file for file in files if _split_of(file.relative_to(root)) == split]
    if not chosen:
        found = sorted({_split_of(file.relative_to(root)) for file in files})
        raise UserError(
            f"data: the folder {path} has no files of split {split!r}; its files belong to: "
            f"{', '.join(found)}. Set `split` to one of those."
        )
    return chosen


def read_rows(source: SourceSpec) -> Iterator[Row | BadLine]:
    """Stream the rows of a source; what cannot be parsed comes as a `BadLine`.

    Raises `UserError` for a source that is missing or cannot be opened.
    """
    if not looks_like_path(source.path):
        yield from _read_hub(source)
        return
    if source.subset is not None or source.revision is not None:
        raise UserError(
            f"data: {source.path} is local, so `subset` and `revision`, which choose within a Hub "
            "data set, cannot apply. Remove them."
        )
    root = _existing(source.path)
    if root.is_file() and source.split != "train":
        raise UserError(
            f"data: {source.path} is one file and has no split {source.split!r}. Name the file "
            "of that split instead."
        )
    if root.is_dir() and (saved := _saved_folder(root, source.split)):
        yield from _read_saved(saved)
        return
    for file in local_files(source.path, source.split):
        yield from _read_file(file)


def _existing(path: str) -> Path:
    """The file or folder at `path`; a `UserError` when there is none or it cannot be reached."""
    try:
        root = Path(path).expanduser()
        if root.exists():
            return root
    except (OSError, RuntimeError) as error:  # no permission, a name too long, no such home
        raise UserError(f"data: {path} cannot be reached: {error}.") from error
    raise UserError(
        f"data: there is no file or folder {path}. Check the path (a Hub id is written "
        "`owner/name`)."
    )


def _split_of(file: Path) -> str:
    """The split a file's name or folder states; files that state none are training data."""
    words = re.split(r"[^a-z]+", str(file.with_suffix("")).lower())
    stated = [word for word in words if word in _SPLITS]
    return stated[-1] if stated else "train"


def _saved_folder(root: Path, split: str) -> Path | None:
    """Where a folder written by `datasets`' save_to_disk keeps a split; None for other folders."""
    if (root / "dataset_dict.json").is_file():
        try:
            names = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError) as error:
            raise UserError(f"data: {root / 'dataset_dict.json'} is not sound: {error}.") from error
        if split not in names:
            raise UserError(f"data: {root} has the splits {', '.join(names)}, not {split!r}.")
        return root / split
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        if split != "train":
            raise UserError(f"data: {root} is one saved split; `split: {split}` cannot apply.")
        return root
    return None


def _read_file(file: Path) -> Iterator[Row | BadLine]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _read_parquet(file)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _read_lines(file)
        elif suffix == ".json":
            yield from _read_json(file)
        else:
            raise UserError(
                f"data: {file} is no kind of file that can be read here. Use one of "
                f"{', '.join(SUFFIXES)}."
            )
    except OSError as error:
        raise UserError(f"data: {file} cannot be read: {error}.") from error


def _read_lines(file: Path) -> Iterator[Row | BadLine]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(line, Origin(str(file), number))


def _parse(line: bytes, origin: Origin) -> Row | BadLine:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadLine(origin, f"is not valid UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadLine(origin, f"is not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadLine(origin, f"is not valid JSON ({error})")
    return _row(value, origin)


def _row(value: object, origin: Origin) -> Row | BadLine:
    if not isinstance(value, dict):
        return BadLine(origin, f"is a JSON {type(value).__name__}, not an object")
    return Row(value, origin)


def _read_json(file: Path) -> Iterator[Row | BadLine]:
    """A .json file: an array of objects, or, as is common, JSON lines under that name."""
    with file.open("rb") as start:
        head = start.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_lines(file)
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadLine(Origin(str(file), 1), f"is not valid UTF-8 (byte {error.start + 1})")
        return
    yield from _parse_array(text, str(file))


def _parse_array(text: str, file: str) -> Iterator[Row | BadLine]:
    """The elements of a JSON array one by one; broken syntax ends it, for the rest is unknowable.

    A broken array is one bad line: without its punctuation nobody can say where rows begin.
    """
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")

    def skip(position: int) -> int:
        match = gap.match(text, position)
        return match.end() if match else position

    position, row = skip(skip(0) + 1), 0
    if text.startswith("]", position):
        return
    while True:
        row += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield BadLine(Origin(file, row), f"and what follows is not valid JSON ({error})")
            return
        yield _row(value, Origin(file, row))
        position = skip(position)
        if text.startswith("]", position):
            return
        if not text.startswith(",", position):
            yield BadLine(Origin(file, row + 1), "is not reached: the JSON array is cut off")
            return
        position = skip(position + 1)


def _read_parquet(file: Path) -> Iterator[Row | BadLine]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    row += 1
                    yield Row(value, Origin(str(file), row))
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is no sound Parquet file (after row {row}: {error}).") from (
            error
        )


def _read_saved(folder: Path) -> Iterator[Row | BadLine]:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data: {folder} is no sound saved data set: {error}.") from error
    yield from _number(table, str(folder))


def _read_hub(source: SourceSpec) -> Iterator[Row | BadLine]:
    import datasets

    try:
        table = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        raise UserError(
            f"data: {source.path} is no file or folder here, and as a Hub data set (split "
            f"{source.split!r}) it could not be loaded: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]} Check name, split, subset, revision and "
            "the network; gated or private data needs `hf auth login`."
        ) from error
    yield from _number(table, f"{source.path}:{source.split}")


def _number(table: Iterable[Any], name: str) -> Iterator[Row]:
    for row, fields in enumerate(table, start=1):
        yield Row(dict(fields), Origin(name, row))
