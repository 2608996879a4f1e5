"""Find records that repeat others, exactly or nearly, or share texts with other sets.

Near duplicates by MinHash over runs of three words and locality-sensitive hashing: Broder, "On the
resemblance and containment of documents" (1997); Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tandem.check.findings import Sign, Tally, excerpt
from tandem.check.record_signs import body_of, digests_of, question_of
from tandem.data.records import Origin, Preference, Record, TokenPair
from tandem.data.text.contamination import RUN, Other, many_words, prompt_digest
from tandem.data.text.word_hashes import Hashes, Words, hash_words

# Two records that share this part of their runs of words are near duplicates.
NEAR = 0.8
_RUN = 3
# With 10 bands of 6, a pair at 0.8 is compared in 95 % of cases, one at 0.9 in all but 1 of 2000,
# one at 0.5 in 15 %; of a pair at 0.8, a share of 0.8 +- 0.05 of the 60 minima is equal.
_BANDS, _ROWS = 10, 6
_MINIMA = _BANDS * _ROWS
Signatures = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What is compared of n records of a file.

    `rows` [n] are their numbers, `digests` [n, 4] are made by `digests_of`, `signatures` [n, 60] by
    `signatures`; `flipped` [n] says whether a pair's answers are in another order than in its
    digest. For other sets, `words` are those of the records' bodies, n texts, and `prompts` [n] the
    digests of questions, 0 for short ones.
    """

    file: str
    rows: NDArray[np.int64]
    digests: Hashes
    signatures: Signatures
    flipped: NDArray[np.bool_]
    words: Words | None
    prompts: Hashes | None


def fingerprints(file: str, records: Sequence[Record], *, words: bool) -> Fingerprints | None:
    """Return what is compared of some records of a file, if any; `words` and prompts if wanted."""
    if not records:
        return None
    found = hash_words([body_of(record) for record in records])
    flipped = [
        (isinstance(one, Preference) and one.chosen > one.rejected)
        or (isinstance(one, TokenPair) and one.chosen > one.rejected)
        for one in records
    ]
    return Fingerprints(
        file,
        np.array([record.origin.row for record in records], dtype=np.int64),
        np.array([digests_of(record) for record in records], dtype=np.uint64),
        signatures(found),
        np.array(flipped, dtype=np.bool_),
        found if words else None,
        np.array([_prompt(record) for record in records], dtype=np.uint64) if words else None,
    )


def _prompt(record: Record) -> int:
    question = question_of(record)
    return prompt_digest(question) if many_words(question) else 0


@dataclass(frozen=True, slots=True)
class Twins:
    """Records `later` [d] that repeat `earlier` ones [d]."""

    later: NDArray[np.int64]
    earlier: NDArray[np.int64]


def signatures(words: Words) -> Signatures:
    """Return [n, 60]: the low bits of the minima of each text's runs under 60 hash functions.

    A text of one or two words counts as one run; one without words has zeros.
    """
    minima = np.zeros((len(words.starts) - 1, _MINIMA), dtype=np.uint16)
    runs, text_of = words.runs(_RUN)
    short = np.flatnonzero((np.diff(words.starts) < _RUN) & (np.diff(words.starts) > 0))
    if len(short):  # hashed by their last word, with the first one mixed in
        ends = words.hashes[words.starts[short + 1] - 1] * np.uint64(3)
        runs = np.concatenate([runs, ends + words.hashes[words.starts[short]]])
        text_of = np.concatenate([text_of, short])
        order = np.argsort(text_of, kind="stable")
        runs, text_of = runs[order], text_of[order]
    if not len(runs):
        return minima
    texts, first = np.unique(text_of, return_index=True)
    high = (runs >> np.uint64(32)).astype(np.uint32)
    for number, (flip, factor) in enumerate(_FUNCTIONS):
        minima[texts, number] = np.minimum.reduceat((high ^ flip) * factor, first) & 0xFFFF
    return minima


def exact_twins(digests: Hashes) -> Twins:
    """Return each record with an earlier one's digest, and the first with it; 0 is no digest."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earliest = first[inverse]
    later = np.flatnonzero((earliest < np.arange(len(digests))) & (digests != 0))
    return Twins(later, earliest[later].astype(np.int64))


def near_twins(
    found: Signatures, skip: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> Twins:
    """Return each record that is like an earlier one, with one that it is like.

    `found` [n, 60] are `signatures`, `skip` numbers of records to leave out. Records of the same
    row, by `rows` [n], are not compared.
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
            later, earlier = members[open_], other[open_]
            for start in range(0, len(later), _AT_ONCE):
                some, others = later[start : start + _AT_ONCE], earlier[start : start + _AT_ONCE]
                alike = (found[some] == found[others]).mean(axis=1) >= NEAR
                partner[some[alike]] = others[alike]
    later = np.flatnonzero(partner >= 0)
    return Twins(later, partner[later])


def _keys(columns: Signatures, numbers: NDArray[np.int64]) -> Hashes:
    keys = np.zeros(len(numbers), dtype=np.uint64)
    for row in range(columns.shape[1]):
        keys = (keys ^ columns[numbers, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(31)
    return keys


_DRAWN = np.random.default_rng(20260101).integers(0, 2**32, size=(_MINIMA, 2), dtype=np.uint32)
# A flip of bits and an odd factor each, always the same ones.
_FUNCTIONS = [(flip, factor | np.uint32(1)) for flip, factor in _DRAWN]
_AT_ONCE = 2**18  # signatures that are compared at once: 30 MB

EXACT = Sign(
    "exact_duplicates", "records that repeat an earlier one exactly", "warning",
    "Each copy counts as one more epoch of it: leave the copies out.",
)  # fmt: skip
NEARLY_REPEATED = Sign(
    "near_duplicates", "records with 80 % of an earlier one's runs of three words", "note",
    "Look at a few: copies with small changes teach little more than one.",
)  # fmt: skip
PROMPTS = Sign(
    "duplicate_prompts", "records with an earlier one's prompt and another answer", "note",
    "May be meant; otherwise keep the best answer.",
)  # fmt: skip
ANSWERS = Sign(
    "duplicate_answers", "records with an earlier one's answer and another prompt", "note",
    "Answers that fit every question teach little.",
)  # fmt: skip
CONTRADICTION = Sign(
    "pairs_contradict", "pairs that prefer the answer which an earlier one rejects", "warning",
    "One of the two is the wrong way round: leave out one, or both.", of="pairs",
)  # fmt: skip
Look = Callable[[set[Origin]], dict[Origin, str]]


class Repeated:
    """Keeps about 150 bytes of each record, and finds records that repeat others."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._file_of, self._rows = array("i"), array("q")
        self._digests: list[Hashes] = []
        self._signatures: list[Signatures] = []
        self._flipped: list[NDArray[np.bool_]] = []

    def add(self, prints: Fingerprints) -> None:
        """Note some records."""
        number = self._numbers.setdefault(prints.file, len(self._files))
        if number == len(self._files):
            self._files.append(prints.file)
        self._file_of.extend([number] * len(prints.rows))
        self._rows.extend(prints.rows.tolist())
        self._digests.append(prints.digests)
        self._signatures.append(prints.signatures)
        self._flipped.append(prints.flipped)

    def finish(self, tally: Tally, look: Look) -> None:
        """Count repeated records; `look` reads the questions of a few records again."""
        if not self._digests:
            return
        shown = self._shown
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
            # Pairs of one row share their prompt and the best answer anyway.
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
        pairs = [
            (sign, self._origin(later), self._origin(earlier))
            for sign, twins in found
            for later, earlier in zip(twins.later[:shown], twins.earlier[:shown], strict=True)
        ]
        texts = look({at for _, at, _ in pairs}) if pairs else {}
        for sign, at, like in pairs:
            where = f"row {like.row}" if like.file == at.file else str(like)
            tally.add_example(sign, at, f"as {where}: {excerpt(texts.get(at, ''))}")
        for sign, twins in found:
            tally.count_only(sign, len(twins.later[shown:]))

    def _row_numbers(self) -> NDArray[np.int64]:
        """Return [n]: one number for all records of a row, which follow each other."""
        files, rows = np.array(self._file_of), np.array(self._rows)
        fresh = (np.diff(files) != 0) | (np.diff(rows) != 0)
        return np.concatenate([[0], np.cumsum(fresh)]).astype(np.int64)

    def _origin(self, number: int) -> Origin:
        return Origin(self._files[self._file_of[number]], self._rows[number])


def look_for_shared(
    prints: Fingerprints,
    others: Sequence[Other],
    tally: Tally,
    read: Callable[[], Sequence[Record]],
) -> None:
    """Count the prompts, or else the words in a row, that other sets have as well.

    `read` gives the records themselves, for the texts of examples.
    """
    assert prints.words is not None
    assert prints.prompts is not None
    once = cache(read)
    for other in others:
        prompts, runs = _signs(other.name)
        whole = set()
        for number in np.flatnonzero(prints.prompts).tolist():
            at = other.prompt(int(prints.prompts[number]))
            if at is not None:
                whole.add(number)
                example = ""
                if tally.wants(prompts):
                    example = _like(at, other, question_of(once()[number]))
                tally.add_example(prompts, _at(prints, number), example)
        for number, at in other.shared(prints.words):
            if number not in whole:
                example = ""
                if tally.wants(runs):
                    example = _like(at, other, other.words_shared(body_of(once()[number])))
                tally.add_example(runs, _at(prints, number), example)


def _at(prints: Fingerprints, number: int) -> Origin:
    return Origin(prints.file, int(prints.rows[number]))


def _signs(other: str) -> tuple[Sign, Sign]:
    """Return the signs that another set has a prompt, and that it has words in a row."""
    return (
        Sign("shared_prompts", f"prompts that are in {other} as well", "warning",
             "What is scored there would be trained on: take them out on one side.", about=other),
        Sign("shared_words", f"texts with {RUN} words in a row of {other}", "warning",
             "What is scored there may be trained on: look at the rows, take them out.",
             about=other),
    )  # fmt: skip


def _like(origin: Origin, other: Other, text: str) -> str:
    where = f"row {origin.row} there" if origin.file == other.name else str(origin)
    return f"as {where}: {excerpt(text)}"
