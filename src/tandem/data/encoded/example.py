"""One encoded record: a prefix of token ids, and the branches that continue it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.data.records import Origin
from tandem.data.tokenize.encode import Encoded

TokenIds = NDArray[np.int32]
TrainedMask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Branch:
    """A path that continues an example's prefix: its tokens [L], and which are targets [L]."""

    input_ids: TokenIds
    trained: TrainedMask
    weights: NDArray[np.float32] | None = None  # of each target's log-prob [L]; None: all 1

    @property
    def fed(self) -> int:
        """Tokens that predict a target of the branch, the prefix's last one aside."""
        trained = np.flatnonzero(self.trained)
        return int(trained[-1]) if len(trained) else 0


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded record: a shared prefix and the branches that continue it.

    A conversation has an empty prefix and one branch; a preference record has the longest common
    token prefix of its answers' sequences and a branch an answer, the best first. A trained token
    of the prefix is a target of every branch. A sequence's first token is never trained: nothing
    predicts it. `scores` say how good each branch is, where the record says so.
    """

    prefix: Branch
    branches: tuple[Branch, ...]
    origin: Origin
    scores: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the example, the shared prefix counted once."""
        return len(self.prefix.input_ids) + sum(len(b.input_ids) for b in self.branches)

    @property
    def fed(self) -> int:
        """Rows that the example takes in a micro-batch: all tokens up to each branch's last target.

        The last target itself predicts nothing and is not fed.
        """
        return len(self.prefix.input_ids) + sum(branch.fed for branch in self.branches)

    def sequence(self, branch: int) -> Branch:
        """Return the prefix and one branch as one path."""
        tail = self.branches[branch]
        return Branch(
            np.concatenate([self.prefix.input_ids, tail.input_ids]),
            np.concatenate([self.prefix.trained, tail.trained]),
        )


def conversation_example(encoded: Sequence[Encoded], origin: Origin) -> Example:
    """Make the example of a conversation's trained answers, oldest first.

    When each answer's sequence continues the one before (the usual case) it is a single path;
    otherwise one branch per answer behind the common prefix, in which nothing is trained, so that
    no answer counts twice.
    """
    if all(b.ids[: len(a.ids)] == a.ids for a, b in pairwise(encoded)):
        last = encoded[-1]
        trained = np.zeros(len(last.ids), dtype=np.bool_)
        for answer in encoded:
            trained[answer.start : len(answer.ids)] = True
        branches = (_branch(last.ids, trained),)
        return Example(_branch([], np.zeros(0, dtype=np.bool_)), branches, origin)
    shared = min(_common(encoded[0].ids, other.ids) for other in encoded[1:])
    return _split(encoded, min(shared, *(answer.start for answer in encoded)), origin)


def preference_example(encoded: Sequence[Encoded], origin: Origin) -> Example:
    """Make the example of a preference record: longest common token prefix, a branch an answer.

    The prefix may reach into the answers; it is shortened so that each branch keeps a token.
    """
    first, *others = encoded
    shared = min(_common(first.ids, other.ids) for other in others)
    shared = min(shared, *(len(answer.ids) - 1 for answer in encoded))
    return _split(encoded, shared, origin)


def _split(encoded: Sequence[Encoded], shared: int, origin: Origin) -> Example:
    masks = [np.arange(len(answer.ids)) >= answer.start for answer in encoded]
    return Example(
        _branch(encoded[0].ids[:shared], masks[0][:shared]),
        tuple(
            _branch(answer.ids[shared:], mask[shared:], first=shared == 0)
            for answer, mask in zip(encoded, masks, strict=True)
        ),
        origin,
    )


def _branch(ids: Sequence[int], trained: Any, *, first: bool = True) -> Branch:
    """Make a branch; `first` says that it begins a sequence, whose first token is not trained."""
    if first and len(trained):
        trained[0] = False
    return Branch(np.frombuffer(array("i", ids), dtype=np.int32), trained)


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    same = 0
    # Blocks compare much faster than their elements, and prompts are long.
    for step in (64, 1):
        while same < length and a[same : same + step] == b[same : same + step]:
            same += step
        same = min(same, length)
    return same
