"""Records that are there more than once, exactly or nearly, or share texts with other sets.

Near duplicates by MinHash over runs of three words and locality-sensitive hashing: Broder, "On the
resemblance and containment of documents" (1997); Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.check.findings import Sign, Tally, excerpt
from tandem.check.record_signs import Record, body_of, question_of
from tandem.data.records import Origin
from tandem.data.text.contamination import RUN, Other, many_words, prompt_digest
from tandem.data.text.word_hashes import Hashes, Words

# Two records whose sets of runs of words have this much in common are near duplicates.
NEAR = 0.8
_RUN = 3
# With 10 bands of 6 a pair at 0.8 is compared in 95 % of cases, one at 0.9 in all but 1 of 2000,
# one at 0.5 in 15 %; of 60 minima, equal ones are 0.8 +- 0.05 of a pair at 0.8.
_BANDS, _ROWS = 10, 6
_MINIMA = _BANDS * _ROWS
Signatures = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Twins:
    """Records that repeat an earlier one: `later` [d] and the `earlier` [d] each is like."""

    later: NDArray[np.int64]
    earlier: NDArray[np.int64]


def signatures(words: Words) -> Signatures:
    """[n, 60]: the low bits of the minima of each text's runs of words under 60 hash functions.

    A text of one or two words counts as one run; one without words has zeros.
    """
    found = np.zeros((len(words.starts) - 1, _MINIMA), dtype=np.uint16)
    runs, text_of = words.runs(_RUN)
    short = np.flatnonzero((np.diff(words.starts) < _RUN) & (np.diff(words.starts) > 0))
    if len(short):  # their last word stands for them, with the first one mixed in
        ends = words.hashes[words.starts[short + 1] - 1] * np.uint64(3)
        runs = np.concatenate([runs, ends + words.hashes[words.starts[short]]])
        text_of = np.concatenate([text_of, short])
        order = np.argsort(text_of, kind="stable")
        runs, text_of = runs[order], text_of[order]
    if not len(runs):
        return found
    texts, first = np.unique(text_of, return_index=True)
    high = (runs >> np.uint64(32)).astype(np.uint32)
    for number, (flip, factor) in enumerate(_FUNCTIONS):
        found[texts, number] = np.minimum.reduceat((high ^ flip) * factor, first) & 0xFFFF
    return found


def exact_twins(digests: Hashes) -> Twins:
    """Each record whose digest an earlier one has, with the first that has it; 0 is none."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earliest = first[inverse]
    later = np.flatnonzero((earliest < np.arange(len(digests))) & (digests != 0))
    return Twins(later, earliest[later].astype(np.int64))


def near_twins(
    found: Signatures, skip: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> Twins:
    """Each record that is like an earlier one, with one that it is like.

    Args:
        found: [n, 60], see `signatures`.
        skip: numbers of records that are left out, exact duplicates for instance.
        rows: [n], the row that each is of; records of one row are not compared.
    """
    if rows is None:
        rows = np.arange(len(found))
    partner = np.full(len(found), -1, dtype=np.int64)
    wanted: NDArray[np.bool_] = np.asarray(found.any(axis=1))
    wanted[skip] = False
    numbers = np.flatnonzero(wanted)
    if not len(numbers):
        return Twins(numbers, numbers)
    for band in range(_BANDS):
        keys = _keys(found[:, band * _ROWS : (band + 1) * _ROWS], numbers)
        order = np.argsort(keys, kind="stable")
        members, keys = numbers[order], keys[order]
        fresh = np.append(True, keys[1:] != keys[:-1])
        first = members[np.maximum.accumulate(np.where(fresh, np.arange(len(keys)), 0))]
        before = np.append(members[:1], members[:-1])
        for other in (first, before):
            open_ = ~fresh & (partner[members] < 0) & (rows[members] != rows[other])
            _pair_up(found, members[open_], other[open_], partner)
    later = np.flatnonzero(partner >= 0)
    return Twins(later, partner[later])


def _pair_up(
    found: Signatures,
    later: NDArray[np.int64],
    earlier: NDArray[np.int64],
    partner: NDArray[np.int64],
) -> None:
    for start in range(0, len(later), _AT_ONCE):
        some, others = later[start : start + _AT_ONCE], earlier[start : start + _AT_ONCE]
        alike = (found[some] == found[others]).mean(axis=1) >= NEAR
        partner[some[alike]] = others[alike]


def _keys(columns: Signatures, numbers: NDArray[np.int64]) -> Hashes:
    keys = np.zeros(len(numbers), dtype=np.uint64)
    for row in range(columns.shape[1]):
        keys = (keys ^ columns[numbers, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(31)
    return keys


def _functions() -> Sequence[tuple[np.uint32, np.uint32]]:
    """A flip of bits and an odd factor each, always the same ones."""
    drawn = np.random.default_rng(20260101).integers(0, 2**32, size=(_MINIMA, 2), dtype=np.uint32)
    return [(flip, factor | np.uint32(1)) for flip, factor in drawn]


_FUNCTIONS = _functions()
# Signatures that are compared at once: 30 MB.
_AT_ONCE = 2**18


EXACT = Sign(
    "exact_duplicates",
    "records that repeat an earlier one exactly",
    "warning",
    "Each copy counts as one more epoch of it: leave the copies out.",
)
NEARLY_REPEATED = Sign(
    "near_duplicates",
    "records with 80 % of an earlier one's runs of three words",
    "note",
    "Look at a few: copies with small changes teach little more than one.",
)
PROMPTS = Sign(
    "duplicate_prompts",
    "records with an earlier one's prompt and another answer",
    "note",
    "May be meant; otherwise keep the best answer.",
)
ANSWERS = Sign(
    "duplicate_answers",
    "records with an earlier one's answer and another prompt",
    "note",
    "Answers that fit every question teach little.",
)
CONTRADICTION = Sign(
    "pairs_contradict",
    "pairs that prefer the answer which an earlier one rejects",
    "warning",
    "One of the two is the wrong way round: leave out one, or both.",
    of="pairs",
)
Look = Callable[[set[Origin]], dict[Origin, str]]


class Repeated:
    """Keeps about 150 bytes of each record, and finds those that repeat another."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._file_of, self._rows = array("i"), array("q")
        self._digests: list[Hashes] = []
        self._signatures: list[Signatures] = []
        self._flipped: list[NDArray[np.bool_]] = []

    def add(
        self,
        origins: Sequence[Origin],
        digests: Hashes,
        signatures: Signatures,
        flipped: Sequence[bool],
    ) -> None:
        """Note n records: their `digests_of` [n, 4] and `signatures` [n, 60].

        `flipped` [n]: whether a pair's answers are in the other order than in its digest.
        """
        for origin in origins:
            number = self._numbers.setdefault(origin.file, len(self._files))
            if number == len(self._files):
                self._files.append(origin.file)
            self._file_of.append(number)
            self._rows.append(origin.row)
        if origins:
            self._digests.append(digests)
            self._signatures.append(signatures)
            self._flipped.append(np.array(flipped, dtype=np.bool_))

    def finish(self, tally: Tally, look: Look) -> None:
        """Count what repeats; `look` reads the questions of a few records again."""
        if not self._digests:
            return
        digests = np.concatenate(self._digests)
        flipped = np.concatenate(self._flipped)
        found: list[tuple[Sign, Twins]] = []
        same = exact_twins(digests[:, 0])
        turned = flipped[same.later] != flipped[same.earlier]
        found.append((CONTRADICTION, Twins(same.later[turned], same.earlier[turned])))
        found.append((EXACT, Twins(same.later[~turned], same.earlier[~turned])))
        rows = self._row_numbers()
        for sign, column, other in ((PROMPTS, 1, 2), (ANSWERS, 3, 1)):
            twins = exact_twins(digests[:, column])
            # A row's pairs share their prompt, and the best answer, by nature.
            own = (
                ~np.isin(twins.later, same.later)
                & (digests[twins.later, other] != digests[twins.earlier, other])
                & (rows[twins.later] != rows[twins.earlier])
            )
            found.append((sign, Twins(twins.later[own], twins.earlier[own])))
        del digests
        signatures = np.concatenate(self._signatures)
        self._signatures = []
        found.append((NEARLY_REPEATED, near_twins(signatures, same.later, rows)))
        shown = {
            self._origin(number)
            for _, twins in found
            for number in twins.later[: self._shown].tolist()
        }
        texts = look(shown) if shown else {}
        for sign, twins in found:
            pairs = zip(
                twins.later[: self._shown].tolist(),
                twins.earlier[: self._shown].tolist(),
                strict=True,
            )
            for later, earlier in pairs:
                at = self._origin(later)
                like = self._origin(earlier)
                where = f"row {like.row}" if like.file == at.file else str(like)
                tally.add_example(sign, at, f"as {where}: {excerpt(texts.get(at, ''))}")
            tally.count_only(sign, len(twins.later) - min(len(twins.later), self._shown))

    def _row_numbers(self) -> NDArray[np.int64]:
        """[n]: one number for all records of a row, which follow each other."""
        files, rows = np.array(self._file_of), np.array(self._rows)
        fresh = (np.diff(files) != 0) | (np.diff(rows) != 0)
        return np.concatenate([[0], np.cumsum(fresh)]).astype(np.int64)

    def _origin(self, number: int) -> Origin:
        return Origin(self._files[self._file_of[number]], self._rows[number])


def look_for_shared(
    records: Sequence[Record], words: Words, others: Sequence[Other], tally: Tally
) -> None:
    """Count the prompts, and else the words in a row, that other sets have as well.

    `words` are those of the records' bodies, [n] texts.
    """
    for other in others:
        prompts, runs = _signs(other.name)
        whole = set()
        for number, record in enumerate(records):
            question = question_of(record)
            at = other.prompt(prompt_digest(question)) if many_words(question) else None
            if at is not None:
                whole.add(number)
                said = _like(at, other, question) if tally.wants(prompts) else ""
                tally.add_example(prompts, record.origin, said)
        for number, at in other.shared(words):
            if number not in whole:
                said = ""
                if tally.wants(runs):
                    said = _like(at, other, other.words_shared(body_of(records[number])))
                tally.add_example(runs, records[number].origin, said)


def _signs(other: str) -> tuple[Sign, Sign]:
    """The signs that a prompt, and that words in a row, are in another set as well."""
    return (
        Sign(
            "shared_prompts",
            f"prompts that are in {other} as well",
            "warning",
            "What is scored there would be trained on: take them out on one side.",
            about=other,
        ),
        Sign(
            "shared_words",
            f"texts with {RUN} words in a row of {other}",
            "warning",
            "What is scored there may be trained on: look at the rows, take them out.",
            about=other,
        ),
    )


def _like(origin: Origin, other: Other, text: str) -> str:
    where = f"row {origin.row} there" if origin.file == other.name else str(origin)
    return f"as {where}: {excerpt(text)}"
