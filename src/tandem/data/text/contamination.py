"""Find texts that a data set shares with another: validation data, evaluation sets.

Two signs: the other set has the whole text, or thirteen words in a row of it (Brown et al.,
"Language Models are Few-Shot Learners", 2020, appendix C).
"""

from __future__ import annotations

import csv
import hashlib
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tandem.data.formats.check_fields import unreadable_text
from tandem.data.formats.format import texts_in
from tandem.data.records import Origin
from tandem.data.sources.chunks import BadLine, Row, allow_long_cells
from tandem.data.sources.compression import kind_of_text, open_text
from tandem.data.sources.rows import looks_like_path, read_rows
from tandem.data.text.word_hashes import MOST_CHARACTERS, Hashes, Words, hash_words
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource

RUN = 13
FORM = 10  # words in a row in more rows of the other set than this are its form, not its content
_LEAST_WORDS = 4  # a text of fewer words is shared by chance
_SHARED = 16  # characters per word of a run, by which the parts of a long text overlap
_MOST_RUNS = 2**24  # kept runs, 12 bytes each; of a larger set every second, fourth, ... is kept
# Texts, or characters of them, that are hashed together.
_AT_ONCE, _MOST_AT_ONCE = 512, 2**20
_WORD = re.compile(r"\w+")
_STRUCTURED = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")


def prompt_digest(text: str) -> int:
    """Return a 64-bit hash of a text without case and spaces; 0 for one without a character."""
    plain = "".join(text.lower().split())
    if not plain:
        return 0
    content = plain.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def many_words(text: str) -> bool:
    """Return whether a prompt has enough words not to be shared by chance."""
    return len(text.split(None, _LEAST_WORDS)) >= _LEAST_WORDS


class Other:
    """A set of texts to search others for; filled with `fill` or `add`, then queried.

    `rows` counts rows that were read, `unreadable` those that could not be parsed, of which
    `first_unreadable` is the first.

    Args:
        name: of the set, for messages.
        runs: whether to look for words in a row, or for whole prompts only.
        run: how many words in a row are a sign.
        form: words in a row in more rows than this are the set's form, no sign; None: no limit.
    """

    def __init__(
        self, name: str, *, runs: bool = True, run: int = RUN, form: int | None = FORM
    ) -> None:
        self.name = name
        self.rows = 0
        self.unreadable = 0
        self.first_unreadable = ""
        self._with_runs = runs
        self._run = run
        self._form = form
        self._origins: list[Origin] = []
        self._prompts: dict[int, int] = {}
        self._short: set[int] = set()
        self._parts: list[tuple[Hashes, NDArray[np.int32]]] = []
        self._kept = 0
        self._mask = 0
        self._waiting: list[tuple[int, str]] = []
        self._characters = 0
        self._runs: tuple[Hashes, NDArray[np.int32]] | None = None

    @property
    def sampled(self) -> int:
        """One of so many runs was kept; 1 when all were."""
        return self._mask + 1

    def add(self, texts: Sequence[str], origin: Origin) -> None:
        """Add the texts of a row."""
        self._origins.append(origin)
        number, self.rows = self.rows, self.rows + 1
        for text in texts:
            if many_words(text):
                self._prompts.setdefault(prompt_digest(text), number)
            for piece in _pieces(text, self._run) if self._with_runs else ():
                self._waiting.append((number, piece))
                self._characters += len(piece)
                if len(self._waiting) >= _AT_ONCE or self._characters >= _MOST_AT_ONCE:
                    self._take()

    def prompt(self, digest: int) -> Origin | None:
        """Return where a prompt with that digest stands, if it does."""
        number = self._prompts.get(digest)
        return None if number is None else self._origins[number]

    def shared(self, words: Words) -> list[tuple[int, Origin]]:
        """Return the number of each text that shares words in a row, and where those stand."""
        known, rows = self.finish()
        runs, text_of = words.runs(self._run)
        if not len(known) or not len(runs):
            return []
        at, same = _find(known, runs)
        hits = np.flatnonzero(same)
        texts, first = np.unique(text_of[hits], return_index=True)
        return [
            (int(text), self._origins[int(rows[at[hits[one]]])])
            for text, one in zip(texts, first, strict=True)
        ]

    def held(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each text whether it shares words in a row, or is a short text of this set."""
        known, _ = self.finish()
        pieces = [(n, piece) for n, text in enumerate(texts) for piece in _pieces(text, self._run)]
        text_of = np.array([n for n, _ in pieces], dtype=np.int64)
        words = hash_words([piece for _, piece in pieces])
        held = np.zeros(len(texts), dtype=np.bool_)
        runs, piece_of = words.runs(self._run)
        if len(known):
            held[text_of[piece_of[_find(known, runs)[1]]]] = True
        for whole, piece in zip(*words.wholes(_LEAST_WORDS, self._run), strict=True):
            held[text_of[piece]] |= int(whole) in self._short
        return held

    def words_shared(self, text: str) -> str:
        """Return a text's first shared words in a row; empty when plain splitting finds none."""
        known, _ = self.finish()
        words = _WORD.findall(text[:MOST_CHARACTERS])
        count = len(words) - self._run + 1
        windows = [" ".join(words[i : i + self._run]) for i in range(count)]
        runs, window_of = hash_words(windows).runs(self._run)
        hits = window_of[np.isin(runs, known)]
        return windows[int(hits[0])] if len(hits) else ""

    def _take(self) -> None:
        words = hash_words([text for _, text in self._waiting])
        self._short.update(words.wholes(_LEAST_WORDS, self._run)[0].tolist())
        runs, text_of = words.runs(self._run)
        numbers = np.array([number for number, _ in self._waiting], dtype=np.int32)
        self._keep(runs, numbers[text_of] if len(runs) else np.zeros(0, dtype=np.int32))
        self._waiting, self._characters = [], 0

    def _keep(self, runs: Hashes, rows: NDArray[np.int32]) -> None:
        wanted = (runs & np.uint64(self._mask)) == 0
        self._parts.append((runs[wanted], rows[wanted]))
        self._kept += int(wanted.sum())
        while self._kept > _MOST_RUNS:
            self._mask = 2 * self._mask + 1
            parts, self._parts, self._kept = self._parts, [], 0
            for some, their_rows in parts:
                self._keep(some, their_rows)

    def finish(self) -> tuple[Hashes, NDArray[np.int32]]:
        """Return the sorted runs and a row of each; nothing may be added after that."""
        if self._runs is None:
            if self._waiting:
                self._take()
            empty = (np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int32))
            parts = [*self._parts, empty]
            runs, rows = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
            self._parts = []
            # A run counts once a row, and not at all when it is in too many rows.
            order = np.lexsort((rows, runs))
            runs, rows = runs[order], rows[order]
            fresh = np.append(True, (runs[1:] != runs[:-1]) | (rows[1:] != rows[:-1]))[: len(runs)]
            runs, rows = runs[fresh], rows[fresh]
            known, first, counts = np.unique(runs, return_index=True, return_counts=True)
            content = counts <= (self._form or len(self._origins))
            self._runs = known[content], rows[first][content]
        return self._runs


def read_other(source: DataSource, *, runs: bool = True) -> Other:
    """Return the finished set of one source; see `fill`."""
    other = Other(source.path, runs=runs)
    fill(other, source)
    other.finish()
    return other


def fill(other: Other, source: DataSource) -> None:
    """Add all texts of a source of any layout, or of a file of plain lines, to `other`.

    CSV files have a header. A file that is no JSON or Parquet is read line by line, also compressed
    (.gz, .bz2, .xz, .zst). Raises `UserError` for a file that cannot be read, or has no text.
    """
    before = other.rows
    for texts, origin in _rows(source):
        if isinstance(texts, BadLine):
            other.unreadable += 1
            other.first_unreadable = other.first_unreadable or f"{origin}: {texts.reason}"
        else:
            other.add(texts, origin)
    if other.rows == before:
        raise UserError(f"data: there is no text in {source.path}.")


def _find(known: Hashes, runs: Hashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each run's place in `known` (sorted, not empty), and whether it is there."""
    at = np.searchsorted(known, runs)
    at[at == len(known)] = 0
    return at, known[at] == runs


def _pieces(text: str, run: int) -> Iterator[str]:
    """Cut a text into parts that `hash_words` reads whole; they overlap, so no run is cut apart."""
    shared = min(_SHARED * run, MOST_CHARACTERS // 2)
    for start in range(0, max(1, len(text) - shared), MOST_CHARACTERS - shared):
        yield text[start : start + MOST_CHARACTERS]


def _rows(source: DataSource) -> Iterator[tuple[list[str] | BadLine, Origin]]:
    path = Path(source.path).expanduser() if looks_like_path(source.path) else None
    if path is not None and path.is_file() and kind_of_text(path) not in _STRUCTURED:
        yield from _plain_rows(path)
        return
    for row in read_rows(source):
        if isinstance(row, Row) and row.broken and (reason := unreadable_text(row.fields)):
            row = BadLine(row.origin, reason)
        yield (row if isinstance(row, BadLine) else list(texts_in(row.fields))), row.origin


def _plain_rows(path: Path) -> Iterator[tuple[list[str], Origin]]:
    separator = {".csv": ",", ".tsv": "\t"}.get(kind_of_text(path))
    allow_long_cells()
    try:
        with open_text(path) as file:
            lines: Iterator[list[str]] = ([line] for line in file)
            header: list[str] = []
            if separator:
                lines = filter(None, csv.reader(file, delimiter=separator))
                header = next(lines, [])
            for number, texts in enumerate(lines, start=1):
                # The header counts as a part of the first row: without a header, it is a row.
                yield [*header, *texts], Origin(str(path), number)
                header = []
    except (OSError, EOFError, csv.Error, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data: {path} cannot be read: {error}.") from error
