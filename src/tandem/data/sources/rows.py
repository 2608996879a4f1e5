"""Stream the rows of a file, a folder or a Hub data set; each knows where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.data.sources.chunks import BadLine, Chunk, Plain, RenamedChunk, Renaming, Row
from tandem.data.sources.file_chunks import count_rows, file_chunks
from tandem.data.sources.local_files import check_regular, files_of, left_out, look_into, same_split
from tandem.data.sources.tables import dataset_chunks
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource

_PATH_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow",
    ".gz", ".zst", ".zip", ".bz2", ".xz",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_like_path(text: str) -> bool:
    """Return whether a data set's name is a path; then it is never tried as a Hub id.

    It is one when it exists, starts like a path, ends like a data file, lies in a folder that
    exists, or could not be a Hub id.
    """
    if text.startswith((".", "/", "~")) or text.lower().endswith(("/", *_PATH_SUFFIXES)):
        return True
    if not _HUB_ID.fullmatch(text) or Path(text).exists():
        return True
    return "/" in text and Path(text).parent.is_dir()


def is_local(name: str) -> bool:
    """Whether a name is of data or a model on this machine, which the embedded demo's is not."""
    return not name.startswith("demo:") and looks_like_path(name)


def local_files(path: str, split: str = "train") -> list[Path]:
    """Return the files of a local source in reading order.

    Raises `UserError` when nothing is there, or nothing that can be read.
    """
    root = _existing(path)
    if not root.is_dir():
        check_regular(root)
        return [root]
    if saved := _saved_folder(root, split):
        return sorted(file for file in saved.iterdir() if file.suffix in (".arrow", ".json"))
    return files_of(look_into(root), split)


def not_read(sources: Sequence[DataSource]) -> list[str]:
    """Return a line on each folder of which the sources leave files out: which, and why.

    Raises as `read_rows` does.
    """
    folders: dict[Path, list[Path]] = {}
    for source in sources:
        if looks_like_path(source.path) and not _saved(source):
            root = _existing(source.path)
            if root.is_dir():
                folders.setdefault(root, []).extend(local_files(source.path, source.split))
    others = {root: left_out(look_into(root), read) for root, read in folders.items()}
    return [f"not read of {root}: {names}" for root, names in others.items() if names]


def renaming_of(source: DataSource) -> Renaming:
    """Return the data's own names of keys and roles."""
    return Renaming(tuple(sorted(source.fields.items())), tuple(sorted(source.roles.items())))


def read_rows(source: DataSource) -> Iterator[Row | BadLine]:
    """Yield the rows of a source; what cannot be parsed is a `BadLine`.

    Raises `UserError` for a source that is missing or cannot be opened.
    """
    for chunk in read_chunks(source):
        yield from chunk.rows()


def read_chunks(source: DataSource) -> Iterator[Chunk]:
    """Yield the chunks of a source in reading order; see `read_rows`."""
    renaming = renaming_of(source)
    for chunk in _chunks_as_they_are(source):
        yield RenamedChunk(chunk, renaming) if renaming else chunk


def unrenamed_rows(source: DataSource) -> Iterator[Row]:
    """Yield the parsed rows of a source under the data's own names; see `read_rows`."""
    for chunk in _chunks_as_they_are(source):
        for row in chunk.rows():
            if isinstance(row, Row):
                yield row


def _chunks_as_they_are(source: DataSource) -> Iterator[Plain]:
    if not looks_like_path(source.path):
        yield from dataset_chunks(load_hub(source), f"{source.path}:{source.split}")
        return
    if saved := _saved(source):
        yield from dataset_chunks(_load_saved(saved), str(saved))
        return
    for file in local_files(source.path, source.split):
        yield from file_chunks(file)


def data_files(source: DataSource) -> tuple[bool, list[Path]]:
    """Return whether `datasets` saved a local source, and its files in reading order.

    Raises as `read_rows` does.
    """
    return _saved(source) is not None, local_files(source.path, source.split)


def origin_names(sources: Sequence[DataSource]) -> list[str]:
    """Return the possible file names of some sources' records, in reading order."""
    names: list[str] = []
    for source in sources:
        if not looks_like_path(source.path):
            names.append(f"{source.path}:{source.split}")
        elif saved := _saved(source):
            names.append(str(saved))
        else:
            names.extend(map(str, local_files(source.path, source.split)))
    return names


def count_sources(sources: Sequence[DataSource]) -> int | None:
    """Return about how many rows some sources have, or None when only reading them all can tell.

    Blank lines count. Raises as `read_rows` does.
    """
    counts = [count for source in sources for count in _counts(source)]
    return None if None in counts else sum(count or 0 for count in counts)


def _counts(source: DataSource) -> list[int | None]:
    if not looks_like_path(source.path):
        return [len(load_hub(source))]
    if saved := _saved(source):
        return [len(_load_saved(saved))]
    return [count_rows(file) for file in local_files(source.path, source.split)]


def _saved(source: DataSource) -> Path | None:
    """Return where `datasets` saved a local source; None for files and other folders."""
    if source.subset is not None or source.revision is not None:
        raise UserError(
            f"data: {source.path} is local, so `subset` and `revision`, which choose within a Hub "
            "data set, cannot apply. Remove them."
        )
    root = _existing(source.path)
    if root.is_dir():
        return _saved_folder(root, source.split)
    if source.split != "train":
        raise UserError(
            f"data: {source.path} is one file and has no split {source.split!r}. Name the file "
            "of that split instead."
        )
    return None


def _existing(path: str) -> Path:
    """Return the file or folder at `path`; raise `UserError` when it cannot be reached."""
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


def _saved_folder(root: Path, split: str) -> Path | None:
    """Return where `datasets`' save_to_disk wrote a split; None for other folders."""
    about = root / "dataset_dict.json"
    if about.is_file():
        try:
            names = json.loads(about.read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError) as error:
            raise UserError(f"data: {about} is damaged: {error}.") from error
        name = same_split(split, names)
        if name is None:
            raise UserError(f"data: {root} has the splits {', '.join(names)}, not {split!r}.")
        return root / name
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        if split != "train":
            raise UserError(f"data: {root} is one saved split; `split: {split}` cannot apply.")
        return root
    return None


def _load_saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data: {folder} is a damaged saved data set: {error}.") from error


def load_hub(source: DataSource) -> Any:
    """Return a data set of the Hub as a table of `datasets`; raise `UserError` when there is none.

    A process loads each once, because loading asks the Hub.
    """
    try:
        return _hub_table(source.path, source.subset, source.split, source.revision)
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        raise UserError(
            f"data: {source.path} is no file or folder here, and as a Hub data set (split "
            f"{source.split!r}) it could not be loaded: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0].rstrip('.')}. Check name, split, subset, "
            "revision and the network; gated or private data needs `hf auth login`."
        ) from error


@lru_cache(maxsize=32)
def _hub_table(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(path, subset, split=split, revision=revision)
