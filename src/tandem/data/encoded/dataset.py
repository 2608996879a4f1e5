"""Examples as a few flat arrays, for sending between processes and for files."""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class FlatArrays:
    """n examples as arrays; an example's parts are its prefix and then its branches."""

    ids: NDArray[np.int32]  # [T]: the tokens of all parts, one after the other
    trained: NDArray[np.bool_]  # [T]: which of them are targets
    parts: NDArray[np.int32]  # [n]: how many parts each example has
    lengths: NDArray[np.int32]  # [P]: tokens of each part
    targets: NDArray[np.int32]  # [P]: trained tokens of each part
    fed: NDArray[np.int32]  # [n]: rows that each example takes in a micro-batch
    rows: NDArray[np.int64]  # [n]: each record's row in its file
    digests: NDArray[np.uint8]  # [S, 32]: `sequence_digest` of each branch's sequence
    prompts: NDArray[np.uint64]  # [n]: `records.prompt_key` of each record
    # [S]: how good each branch is, NaN where that is not said; [0] where it is nowhere said
    scores: NDArray[np.float64]


def to_arrays(examples: Sequence[Example], prompts: Sequence[int] | None = None) -> FlatArrays:
    """Return the arrays of some examples; without `prompts` (`records.prompt_key`) all differ."""
    parts = [part for example in examples for part in (example.prefix, *example.branches)]
    lengths = np.array([len(part.input_ids) for part in parts], dtype=np.int32)
    trained = _joined([part.trained for part in parts], np.bool_)
    ends = np.cumsum(lengths, dtype=np.int64)
    counted = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(trained, dtype=np.int64)])
    digests = b"".join(
        sequence_digest(example.prefix, branch)
        for example in examples
        for branch in example.branches
    )
    return FlatArrays(
        ids=_joined([part.input_ids for part in parts], np.int32),
        trained=trained,
        parts=np.array([1 + len(example.branches) for example in examples], dtype=np.int32),
        lengths=lengths,
        targets=(counted[ends] - counted[ends - lengths]).astype(np.int32),
        fed=np.array([example.fed for example in examples], dtype=np.int32),
        rows=np.array([example.origin.row for example in examples], dtype=np.int64),
        digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        prompts=np.array(range(len(examples)) if prompts is None else prompts, dtype=np.uint64),
        scores=_scores(examples),
    )


def _scores(examples: Sequence[Example]) -> NDArray[np.float64]:
    if not any(example.scores for example in examples):
        return np.zeros(0)
    unsaid = (math.nan,)
    every = [example.scores or unsaid * len(example.branches) for example in examples]
    return np.array([score for scores in every for score in scores])


def sequence_digest(prefix: Branch, branch: Branch) -> bytes:
    """Return the SHA-256 of a sequence's length, tokens, targets and weights, not of its origin."""
    digest = hashlib.sha256()
    digest.update((len(prefix.input_ids) + len(branch.input_ids)).to_bytes(8, "little"))
    for part in (prefix, branch):
        digest.update(part.input_ids.astype("<i4", copy=False).tobytes())
    digest.update(np.packbits(np.concatenate([prefix.trained, branch.trained])).tobytes())
    for part in (prefix, branch):
        if part.weights is not None:
            digest.update(part.weights[part.trained].tobytes())
    return digest.digest()


def _joined(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


_DIGESTS = 2**16  # sequences whose digests are read at once


class Bytes:
    """Bytes in memory or in a file, which stays readable when it is deleted.

    A file is read and not mapped, so that its content is in the system's cache and not in this
    process's memory.
    """

    def __init__(self, source: bytes | bytearray | Path) -> None:
        self._memory = None if isinstance(source, Path) else source
        self._file = -1
        if isinstance(source, Path):
            self._file = os.open(source, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def read(self, start: int, stop: int) -> bytes | bytearray:
        """Return the bytes from `start` to `stop` - 1."""
        if self._memory is not None:
            return self._memory[start:stop]
        parts = []
        while start < stop:  # one call reads at most 2 GiB
            part = os.pread(self._file, stop - start, start)
            if not part:
                raise OSError(f"an encoded data set ends at byte {start}, before {stop}")
            parts.append(part)
            start += len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Index:
    """The arrays of n encoded examples with P parts that are kept in memory; see `FlatArrays`."""

    parts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    targets: NDArray[np.int32]
    fed: NDArray[np.int32]
    rows: NDArray[np.int64]
    files: NDArray[np.int32]  # [n]: the number of each record's file in `names`
    prompts: NDArray[np.uint64]
    scores: NDArray[np.float64]
    names: tuple[str, ...]  # the names of the files
    sources: tuple[int, ...]  # how many records each data source gave, in reading order
    split: bool = False  # whether examples of one row that follow each other are of one record


class EncodedDataset(Sequence[Example]):
    """n encoded records; their counts are arrays, and each access makes an `Example`.

    Args:
        index: lengths and origins.
        ids: int32 tokens of all parts.
        trained: one bit per token, whether it is a target, most significant bit first.
        digests: `sequence_digest` of each sequence.
        chosen: the positions in the index of these records, ascending; None: all.
    """

    def __init__(
        self,
        index: Index,
        ids: Bytes,
        trained: Bytes,
        digests: Bytes,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._index = index
        self._ids, self._trained, self._digests = ids, trained, digests
        self._first_part = _starts(index.parts)
        self._first_token = _starts(index.lengths)
        self._chosen = np.arange(len(index.parts)) if chosen is None else chosen

    def select(self, positions: NDArray[np.int64]) -> EncodedDataset:
        """Return the records at ascending positions; they share the bytes."""
        chosen = self._chosen[positions]
        return EncodedDataset(self._index, self._ids, self._trained, self._digests, chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(number) for number in range(*index.indices(len(self)))]
        number = int(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self._example(number)

    @property
    def records(self) -> int:
        """How many records the examples are of: documents may have several."""
        if not self._index.split or not len(self):
            return len(self)
        rows, files = (all_[self._chosen] for all_ in (self._index.rows, self._index.files))
        return 1 + int(np.count_nonzero(np.diff(rows) | np.diff(files)))

    @property
    def fed(self) -> NDArray[np.int32]:
        """[n]: rows that each example takes in a micro-batch."""
        return self._index.fed[self._chosen]

    @property
    def branches(self) -> NDArray[np.int32]:
        """[n]: sequences of each example."""
        return self._index.parts[self._chosen] - 1

    @property
    def prompts(self) -> NDArray[np.uint64]:
        """[n]: `records.prompt_key` of each record."""
        return self._index.prompts[self._chosen]

    @property
    def sources(self) -> tuple[int, ...]:
        """How many of the records each data source gave, in the records' order."""
        ends = np.searchsorted(self._chosen, np.cumsum(self._index.sources, dtype=np.int64))
        return tuple(np.diff(ends, prepend=0).tolist())

    @property
    def prefix_lengths(self) -> NDArray[np.int32]:
        """[n]: tokens of each example's prefix, which its sequences share."""
        return self._index.lengths[self._first_part[:-1][self._chosen]]

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """[S]: tokens of each sequence, its prefix included, example by example."""
        return self._per_sequence(self._index.lengths)

    @property
    def sequence_targets(self) -> NDArray[np.int32]:
        """[S]: trained tokens of each sequence, those of its prefix included."""
        return self._per_sequence(self._index.targets)

    @property
    def scores(self) -> NDArray[np.float64]:
        """[S]: how good each sequence is, by its record; NaN where that is not said."""
        scores = self._index.scores
        if not len(scores):
            return np.full(int(self.branches.sum()), math.nan)
        if len(self) == len(self._index.parts):
            return scores
        return scores[self._sequences_of(self._chosen, 0, len(self._index.parts))]

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """[n]: tokens of each example's first sequence that are not trained."""
        first = _starts(self.branches)[:-1]
        return (self.sequence_lengths - self.sequence_targets)[first]

    def digests(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the digests [S', 32] of the sequences of examples `start` to `stop` - 1."""
        chosen = self._chosen[start:stop]
        if not len(chosen):
            return np.zeros((0, DIGEST_BYTES), dtype=np.uint8)
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        # Each example has one part that is no sequence.
        bounds = [int(self._first_part[example]) - example for example in (first, last)]
        content = self._digests.read(bounds[0] * DIGEST_BYTES, bounds[1] * DIGEST_BYTES)
        rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        if last - first == len(chosen):
            return rows
        return rows[self._sequences_of(chosen, first, last)]

    def all_digests(self) -> Iterator[bytes]:
        """Yield the digests of all sequences in order, in blocks."""
        for start in range(0, len(self), _DIGESTS):
            yield self.digests(start, min(start + _DIGESTS, len(self))).tobytes()

    def _per_sequence(self, per_part: NDArray[np.int32]) -> NDArray[np.int32]:
        prefix = per_part[self._first_part[:-1]]
        of_branches = np.ones(len(per_part), dtype=np.bool_)
        of_branches[self._first_part[:-1]] = False
        whole = per_part[of_branches] + np.repeat(prefix, self._index.parts - 1)
        if len(self) == len(self._index.parts):
            return whole
        return whole[self._sequences_of(self._chosen, 0, len(self._index.parts))]

    def _sequences_of(self, chosen: NDArray[np.int64], first: int, last: int) -> NDArray[np.bool_]:
        """Return which sequences of the index's examples `first` to `last` - 1 are chosen."""
        member = np.zeros(last - first, dtype=np.bool_)
        member[chosen - first] = True
        return np.repeat(member, self._index.parts[first:last] - 1)

    def _example(self, position: int) -> Example:
        number = int(self._chosen[position])
        first, last = int(self._first_part[number]), int(self._first_part[number + 1])
        bounds = self._first_token[first : last + 1]
        start, stop = int(bounds[0]), int(bounds[-1])
        ids = np.frombuffer(self._ids.read(4 * start, 4 * stop), dtype="<i4")
        bits = np.frombuffer(self._trained.read(start // 8, -(-stop // 8)), dtype=np.uint8)
        trained = np.unpackbits(bits)[start % 8 : start % 8 + stop - start].view(np.bool_)
        cuts = (bounds[1:-1] - start).tolist()
        parts: list[Any] = [
            Branch(ids[a:b], trained[a:b])
            for a, b in zip([0, *cuts], [*cuts, stop - start], strict=True)
        ]
        index = self._index
        origin = Origin(index.names[index.files[number]], int(index.rows[number]))
        scores: tuple[float, ...] = ()
        if len(index.scores):
            # Each example before has one part that is no sequence.
            own = index.scores[first - number : last - number - 1]
            scores = () if np.isnan(own).any() else tuple(own.tolist())
        return Example(parts[0], tuple(parts[1:]), origin, scores)


def _starts(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])
