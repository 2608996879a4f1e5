"""Trees as a few flat arrays: how they travel between processes and lie on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.data.records import Branch, Tree

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Columns:
    """n trees as arrays; a tree's parts are its prefix and then its branches.

    Attributes:
        ids: [T] int32, the tokens of all parts, one after the other.
        trained: [T] bool, which of them are targets.
        parts: [n] int32, how many parts each tree has.
        lengths: [P] int32, tokens of each part.
        targets: [P] int32, trained tokens of each part.
        fed: [n] int32, rows that each tree takes in a micro-batch.
        rows: [n] int64, each record's row in its file.
        digests: [S, 32] uint8, `sequence_digest` of each branch's sequence.
        prompts: [n] uint64, `records.prompt_key` of each record.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    parts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    targets: NDArray[np.int32]
    fed: NDArray[np.int32]
    rows: NDArray[np.int64]
    digests: NDArray[np.uint8]
    prompts: NDArray[np.uint64]


def to_columns(trees: Sequence[Tree], prompts: Sequence[int] | None = None) -> Columns:
    """The arrays of some trees.

    Args:
        trees: encoded records.
        prompts: `records.prompt_key` of each; by default no two have the same.
    """
    parts = [part for tree in trees for part in (tree.prefix, *tree.branches)]
    lengths = np.array([len(part.input_ids) for part in parts], dtype=np.int32)
    trained = _joined([part.trained for part in parts], np.bool_)
    ends = np.cumsum(lengths, dtype=np.int64)
    counted = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(trained, dtype=np.int64)])
    digests = b"".join(
        sequence_digest(tree.prefix, branch) for tree in trees for branch in tree.branches
    )
    return Columns(
        ids=_joined([part.input_ids for part in parts], np.int32),
        trained=trained,
        parts=np.array([1 + len(tree.branches) for tree in trees], dtype=np.int32),
        lengths=lengths,
        targets=(counted[ends] - counted[ends - lengths]).astype(np.int32),
        fed=np.array([tree.fed for tree in trees], dtype=np.int32),
        rows=np.array([tree.origin.row for tree in trees], dtype=np.int64),
        digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        prompts=np.array(range(len(trees)) if prompts is None else prompts, dtype=np.uint64),
    )


def sequence_digest(prefix: Branch, branch: Branch) -> bytes:
    """SHA-256 of a sequence's length, token ids and targets: what it is, apart from its origin."""
    digest = hashlib.sha256()
    digest.update((len(prefix.input_ids) + len(branch.input_ids)).to_bytes(8, "little"))
    digest.update(prefix.input_ids.astype("<i4", copy=False).tobytes())
    digest.update(branch.input_ids.astype("<i4", copy=False).tobytes())
    digest.update(np.packbits(np.concatenate([prefix.trained, branch.trained])).tobytes())
    return digest.digest()


def _joined(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
