"""Records that are there more than once, exactly or nearly, in a few bytes a record.

Near duplicates by MinHash over runs of three words and locality-sensitive hashing: Broder, "On the
resemblance and containment of documents" (1997); Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.data.words import Hashes, Words

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
    """Each record whose digest an earlier one has, with the first that has it; 0 counts for none.

    Args:
        digests: [n].
    """
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
        rows: [n], the row that each is of, if some are of the same; those are not compared.
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
