"""Some records of each data set, spread over the whole of it, as files that stages read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tandem.data.read_records import bad_line
from tandem.data.records import Origin, Unreadable
from tandem.data.resolve_sources import resolve_sources
from tandem.data.sources.chunks import BadLine, Chunk, Row
from tandem.data.sources.rows import looks_like_path, read_chunks
from tandem.errors import UserError
from tandem.recipe.choices import OnBadRecord
from tandem.recipe.data_source import DataSource

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Some records of a data set."""

    source: DataSource  # the file that they are in, with the meaning of the data set's rows
    of: str  # what the recipe calls the data set
    taken: int
    rows: int  # of the whole data set, blank lines included

    def __str__(self) -> str:
        name = Path(self.of).name if looks_like_path(self.of) else self.of
        return f"{self.taken} of {self.rows:,} rows of {name}"


@dataclass
class Sampler:
    """Takes samples into a folder, and remembers where each record came from."""

    folder: Path
    count: int  # records of each data set
    seed: int
    origins: dict[str, list[str]] = field(default_factory=dict)  # of each line of a sample's file

    def sample(
        self,
        sources: Sequence[DataSource],
        name: str,
        *,
        count: int | None = None,
        on_bad_record: OnBadRecord = "stop",
    ) -> list[Sample]:
        """Samples of some data sets; `name` is of their folder.

        Raises UserError for data that is not there or has no rows, and at a record that cannot be
        parsed, if a run stops there.
        """
        samples = []
        for number, source in enumerate(sources):
            folder = self.folder / name / str(number)
            taken, rows = self._rows_of(source, folder, count or self.count)
            for row in taken:
                if isinstance(row, BadLine) and on_bad_record == "stop":
                    raise bad_line(row)
            samples.append(self._written(source, folder, taken, rows))
        return samples

    def translated(self, text: str) -> str:
        """A message with the data's own files and rows in place of the samples'."""

        def place(match: re.Match[str]) -> str:
            origins = self.origins[match[1]]
            number = int(match[2]) if match[2] else 0
            return origins[number] if number < len(origins) else match[0]

        # Longer names first: one may be the beginning of another.
        names = "|".join(map(re.escape, sorted(self.origins, key=len, reverse=True)))
        return re.sub(f"({names})(?:, row (\\d+))?", place, text) if names else text

    def fewer(
        self, samples: Sequence[Sample], name: str, usable: Iterable[Origin], count: int
    ) -> list[Sample]:
        """Of each sample some of its `usable` records, among the shorter half, in other files.

        Of a sample of which none is usable any record will do.
        """
        rows: dict[str, list[int]] = {}
        for origin in usable:
            rows.setdefault(origin.file, []).append(origin.row)
        return [
            self._part(sample, self.folder / name / str(number), rows, count)
            for number, sample in enumerate(samples)
        ]

    def _part(
        self, sample: Sample, folder: Path, rows: Mapping[str, list[int]], count: int
    ) -> Sample:
        whole = Path(sample.source.path)
        lines = whole.read_text(encoding="utf-8").split("\n")
        usable = set(rows.get(str(whole), range(1, sample.taken + 1)))
        by_length = sorted(usable, key=lambda place: (len(lines[place - 1]), place))
        places = spread(sorted(by_length[: -(-len(by_length) // 2)]), count)
        folder.mkdir(parents=True)
        path = folder / whole.name
        path.write_text("".join(f"{lines[place - 1]}\n" for place in places), encoding="utf-8")
        origins = self.origins[str(whole)]
        self.origins[str(path)] = [origins[0], *(origins[place] for place in places)]
        source = sample.source.model_copy(update={"path": str(path)})
        return Sample(source, sample.of, len(places), sample.rows)

    def _rows_of(
        self, source: DataSource, folder: Path, count: int
    ) -> tuple[list[Row | BadLine], int]:
        """Some rows of a data set under its own names, and how many it has."""
        folder.mkdir(parents=True)
        (local,) = resolve_sources([source], folder / "demo", self.seed)
        plain = local.model_copy(update={"fields": {}, "roles": {}})
        chunks, rows = _spread_chunks(read_chunks(plain), count)
        each = -(-count // max(1, len(chunks)))
        taken = [row for chunk in chunks for row in spread(list(chunk.rows()), each)]
        if not taken:
            raise UserError(f"data: {source.path} is empty.")
        return spread(taken, count), rows

    def _written(
        self, source: DataSource, folder: Path, taken: Sequence[Row | BadLine], rows: int
    ) -> Sample:
        """The sample of a data set, in a file."""
        path = folder / f"{_named(source)}.jsonl"
        path.write_text("".join(f"{_line(row)}\n" for row in taken), encoding="utf-8")
        self.origins[str(path)] = [source.path, *(str(row.origin) for row in taken)]
        changed = {"path": str(path), "split": "train", "subset": None, "revision": None}
        return Sample(source.model_copy(update=changed), source.path, len(taken), rows)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(at * (len(items) - 1) / (count - 1))] for at in range(count)]


def _spread_chunks(chunks: Iterable[Chunk], most: int) -> tuple[list[Chunk], int]:
    """At most so many chunks, spread over all, and how many rows all have; few are held at once."""
    kept: list[Chunk] = []
    stride, rows = 1, 0
    last: Chunk | None = None
    for number, chunk in enumerate(chunks):
        rows += chunk.count
        last = chunk
        if number % stride == 0:
            kept.append(chunk)
        if len(kept) > 2 * most:
            kept, stride = kept[::2], stride * 2
    if last is not None and kept[-1] is not last:
        kept.append(last)
    return spread(kept, most), rows


def _line(row: Row | BadLine) -> str:
    if isinstance(row, BadLine):
        return f"<{row.origin}>"  # no record for a reader, either
    there = {key: value for key, value in row.fields.items() if not isinstance(value, Unreadable)}
    return json.dumps(there, ensure_ascii=False, default=str)


def _named(source: DataSource) -> str:
    name = Path(source.path).name.split(".")[0] or "data"
    return re.sub(r"[^\w-]+", "-", name.removeprefix("demo:"))
