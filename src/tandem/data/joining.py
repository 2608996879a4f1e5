"""Rows with one labelled answer each, put together to pairs by their prompts.

A row waits until one with the same prompt and the other label comes. Waiting rows are kept in a
temporary file beyond 64 MiB, so that memory holds a digest and a place of each, and no texts.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import groupby, islice
from tempfile import SpooledTemporaryFile

from tandem.data.chunks import BadLine, Chunk, Row, RowChunk
from tandem.data.formats.conversations import read_completion
from tandem.data.formats.rows import Fields, Format, Unusable
from tandem.data.formats.turns import tools_in
from tandem.data.formats.unpaired import BEFORE, label_of

_IN_MEMORY = 2**26
_ROWS = 256


def joined(chunks: Iterable[Chunk], known: Format) -> Iterator[Chunk]:
    """The pieces with each good answer beside a bad one to the same prompt, first come first.

    The rows are in the labelled format `known`.

    A pair is the later of its two rows, with `chosen` and `rejected`.
    Rows that stay alone come last, as they are; rows that cannot be told, in their place.
    """
    with _Waiting(known) as waiting:
        for chunk in chunks:
            rows = [row for row in map(waiting.meet, chunk.rows()) if row is not None]
            yield RowChunk(chunk.file, chunk.count, tuple(rows))
        for file, alone in groupby(waiting.left(), key=lambda row: row.origin.file):
            while some := tuple(islice(alone, _ROWS)):
                yield RowChunk(file, 0, some)


class _Waiting:
    """Rows without a partner, as a context manager; its file ends with it."""

    def __init__(self, known: Format) -> None:
        assert known.labelled is not None
        self._apart, self._keys = known.labelled, known.read_keys
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  (closed by exit)
        # By prompt and label, places in the file, the first come first. Lists, for an empty deque
        # takes more than all else of an answer, and most prompts have few.
        self._places: defaultdict[tuple[bytes, bool], list[int]] = defaultdict(list)
        self._end = 0

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def meet(self, row: Row | BadLine) -> Row | BadLine | None:
        """A row's pair, the row itself if it can have none, or None when it now waits."""
        if isinstance(row, BadLine):
            return row
        try:
            label = label_of(row.fields)
            own = self._apart(row.fields)
            # Or its partner would be lost with it.
            tools_in(row.fields)
            read_completion(own, row.origin)
            prompt = _digest(own)
            others = self._places.get((prompt, not label))
            if others is None:
                self._places[prompt, label].append(self._keep(row))
                return None
        except (Unusable, RecursionError):
            return row
        other = self._apart(self._read(others.pop(0)).fields)
        if not others:
            del self._places[prompt, not label]
        good, bad = (own, other) if label else (other, own)
        answers = {"chosen": good["completion"], "rejected": bad["completion"]}
        # A label as text might be taken for the name of the preferred answer.
        return Row({**own, **answers, "label": label}, row.origin)

    def left(self) -> Iterator[Row]:
        """The rows that wait at the end, in reading order."""
        for place in sorted(place for places in self._places.values() for place in places):
            yield self._read(place)

    def _keep(self, row: Row) -> int:
        place = self._end
        self._file.seek(place)
        kept = {key: value for key, value in row.fields.items() if key in self._keys}
        pickle.dump(Row(kept, row.origin, row.broken), self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._end = self._file.tell()
        return place

    def _read(self, place: int) -> Row:
        self._file.seek(place)
        row: Row = pickle.load(self._file)
        return row


def _digest(fields: Fields) -> bytes:
    """Of all that stands before an answer; an empty text there is the same as none."""
    prompt = [fields.get(key) or None for key in BEFORE]
    text = json.dumps(prompt, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=16).digest()
