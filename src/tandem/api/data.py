"""Data as Python has it: paths, Hub ids, rows and `datasets`, for recipes that name files.

Rows are written to a file that is named after its content, so that the same rows are the same
stage, and a recipe can name them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.storage.atomic_files import atomic_write_parts
from tandem.storage.hashing import hash_file

if TYPE_CHECKING:
    from datasets import Dataset

    Rows: TypeAlias = Sequence[Mapping[str, Any]]
    One: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | DataSource | Source | Dataset"
    Data: TypeAlias = One | Rows | Sequence[One | Rows]

_DIGITS = 12  # of a content's hash in the name of its file
_NAME = re.compile(r"[^\w.-]+")
_KEYS = frozenset(DataSource.model_fields)


@dataclass(frozen=True)
class Source:
    """A data set with settings of its own; made by `source`."""

    data: Any
    settings: Mapping[str, Any] = field(default_factory=dict)


def source(data: One | Rows, **settings: Any) -> Source:
    """Return a data set with settings of its own, for a call's data or a list of them.

    Args:
        data: a path, a Hub id, `demo:NAME`, a list of rows, or a `datasets.Dataset`.
        settings: keys of a data set in a recipe: `weight` (how often an epoch shows each record),
            `split`, `subset`, `revision`, `format`, `fields`, `roles`, `completions`.

    Raises UserError for a key that a data set does not have.
    """
    from tandem.api.names import by_own_names

    return Source(data, by_own_names("source", settings, _KEYS - {"path"}, {}, {}))


@dataclass(frozen=True)
class NamedData:
    """A data set that a recipe can name as soon as its rows are written."""

    settings: Mapping[str, Any]  # its keys in a recipe, but for the path of rows
    rows: Iterable[Mapping[str, Any]] | None = None  # None: they have a path of their own
    title: str = "rows"
    digest: str = ""  # of the rows' text

    @property
    def name(self) -> str:
        """What it is called in the name of a folder."""
        if self.rows is not None:
            return self.title
        return Path(str(self.settings["path"]).partition(":")[2] or self.settings["path"]).stem

    def file_in(self, folder: Path) -> Path | None:
        """Where its rows are in a folder of data; None for data that has a path of its own."""
        if self.rows is None:
            return None
        return folder / f"{self.title}-{self.digest[:_DIGITS]}.jsonl"

    def in_folder(self, folder: Path, call: str) -> dict[str, Any]:
        """Its keys in a recipe; rows are written into `folder` unless they are there."""
        path = self.file_in(folder)
        if path is None or self.rows is None:
            return dict(self.settings)
        if not path.is_file() or hash_file(path) != self.digest:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_parts(path, _lines(self.rows, call))
        return {**self.settings, "path": str(path)}


@contextmanager
def rows_written(
    pieces: Iterable[NamedData], folder: Path, started: Callable[[], bool]
) -> Iterator[None]:
    """Surround what writes rows into `folder` and uses them: without a use, nothing stays.

    `started` says after an error whether anything was begun that needs the rows.
    """
    files = [file for piece in pieces if (file := piece.file_in(folder)) and not file.exists()]
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except UserError:
        if not started():
            for file in files:
                file.unlink(missing_ok=True)
            for place in missing:
                with suppress(OSError):  # it is no longer empty, or was not made
                    place.rmdir()
        raise


def named_data(data: Any, call: str) -> list[NamedData]:
    """Look at the data of a call; nothing is written.

    Raises UserError for what is no data, rows that JSON cannot hold, and data without rows.
    """
    items = [data] if _is_one(data) else list(data)
    if not items:
        raise UserError(f"{call}(): the data is empty; give rows, a path or a Hub id")
    return [_named(item, call) for item in items]


def _is_one(data: Any) -> bool:
    """Whether data is a single data set, such as one list of rows, and no list of data sets."""
    if isinstance(data, str | PathLike | Mapping | DataSource | Source) or not _is_list(data):
        return True
    return any(_is_row(item) for item in data)


def _is_list(data: Any) -> bool:
    return isinstance(data, list | tuple)


def _is_row(item: Any) -> bool:
    """Whether a mapping is a row, and no data set as a recipe writes it."""
    return isinstance(item, Mapping) and not _is_written(item)


def _is_written(item: Mapping[str, Any]) -> bool:
    return "path" in item and item.keys() <= _KEYS


def _named(item: Any, call: str) -> NamedData:
    settings: dict[str, Any] = {}
    if isinstance(item, Source):
        item, settings = item.data, dict(item.settings)
    if isinstance(item, str | PathLike):
        return NamedData({**settings, "path": fspath(item)})
    if isinstance(item, DataSource):
        return NamedData({**item.model_dump(mode="json", exclude_unset=True), **settings})
    if isinstance(item, Mapping) and _is_written(item):
        return NamedData({**item, **settings})
    rows, title = _rows_of(item, call)
    if "split" in settings or "subset" in settings or "revision" in settings:
        raise UserError(f"{call}(): split, subset and revision are for data that has a name")
    digest, count = hashlib.sha256(), 0
    for line in _lines(rows, call):
        digest.update(line.encode())
        count += 1
    if not count:
        raise UserError(f"{call}(): the data is empty; give rows, a path or a Hub id")
    return NamedData(settings, rows, title, digest.hexdigest())


def _rows_of(item: Any, call: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    """The rows of a list or a data set, and what to call them; they can be read again."""
    kind = type(item).__name__
    module = type(item).__module__.partition(".")[0]
    if module == "datasets":
        if kind == "Dataset":
            title = _NAME.sub("-", str(getattr(item.info, "dataset_name", None) or "rows"))
            return item, title
        if kind == "DatasetDict":
            names = ", ".join(map(str, item))
            raise UserError(
                f"{call}(): the data is a DatasetDict with the splits {names}; give one of them, "
                f"for instance data[{next(iter(item), 'train')!r}]"
            )
        raise UserError(
            f"{call}(): the data is a {kind}, whose rows come one after the other and cannot be "
            "told apart from other rows; give a Hub id, or so many rows: "
            "datasets.Dataset.from_list(list(data.take(10_000)))"
        )
    if _is_list(item) and all(isinstance(row, Mapping) for row in item):
        return item, "rows"
    if _is_list(item):
        wrong = next(i for i, row in enumerate(item) if not isinstance(row, Mapping))
        raise UserError(
            f"{call}(): row {wrong} of the data is a {type(item[wrong]).__name__}; a row is a "
            "dict, such as {'messages': [...]}"
        )
    advice = {"DataFrame": "; give data.to_dict('records')", "generator": "; give list(data)"}
    raise UserError(
        f"{call}(): the data is a {kind}; give a path, a Hub id, a list of dicts or a "
        f"datasets.Dataset{advice.get(kind, '')}"
    )


def _lines(rows: Iterable[Mapping[str, Any]], call: str) -> Iterator[str]:
    """Each row as a line of JSON, its keys in their order: templates write them in this order."""
    for number, row in enumerate(rows):
        try:
            yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{call}(): row {number} of the data cannot be written as JSON: {error}"
            ) from None
