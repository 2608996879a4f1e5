"""Encoded records as some losses need them: with other answers, or with weights on their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.example import Branch, Example
from tandem.errors import UserError


class ExampleView(Sequence[Example]):
    """`count` examples, each made by `make` when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Example]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(self._count))]
        return self._make(int(index))


def with_other_answers(dataset: EncodedDataset, max_length: int) -> ExampleView:
    """Each record's prompt with the answer of the next record that has another prompt.

    The records have one answer each. An answer that would go beyond `max_length` tokens is cut.
    Raises UserError where there is no second record.
    """
    partners = _partners(dataset.prompts)

    def make(index: int) -> Example:
        own, other = dataset[index], dataset[int(partners[index])]
        prompt, answer = own.sequence(0), other.sequence(0)
        start, begins = _answer_start(prompt), _answer_start(answer)
        ids = np.concatenate([prompt.input_ids[:start], answer.input_ids[begins:]])[:max_length]
        asked = np.zeros(start, dtype=np.bool_)
        trained = np.concatenate([asked, answer.trained[begins:]])[:max_length]
        nothing = Branch(ids[:0], trained[:0])
        return Example(nothing, (Branch(ids, trained),), own.origin)

    return ExampleView(len(dataset), make)


def _answer_start(sequence: Branch) -> int:
    return int(np.flatnonzero(sequence.trained)[0])


def _partners(prompts: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The next record of another prompt, around the end; any other one if all have the same [n]."""
    count = len(prompts)
    if count < 2:
        raise UserError(
            "this loss compares answers to different prompts, and there is only one record: give "
            "it more data"
        )
    following = (np.arange(count) + 1) % count
    changes = prompts[following] != prompts
    if not changes.any():
        return following
    last = np.flatnonzero(changes)  # the last record of each run of one prompt
    run = np.searchsorted(last, np.arange(count)) % len(last)
    return following[last[run]]


def with_length_weights(dataset: Sequence[Example], alpha: float) -> ExampleView:
    """Pairs whose tokens beyond the shorter answer's length weigh `alpha` (LD-DPO, 2409.06411).

    The prompt's own tokens are not trained, so that an answer's n-th trained token is its n-th.
    """

    def make(index: int) -> Example:
        pair = dataset[index]
        shared = int(pair.prefix.trained.sum())
        shorter = shared + min(int(branch.trained.sum()) for branch in pair.branches)

        def weighted(part: Branch, before: int) -> Branch:
            place = before + np.cumsum(part.trained)
            weights = np.where(place <= shorter, 1.0, alpha).astype(np.float32)
            return replace(part, weights=weights)

        branches = tuple(weighted(branch, shared) for branch in pair.branches)
        return Example(weighted(pair.prefix, 0), branches, pair.origin)

    return ExampleView(len(dataset), make)
