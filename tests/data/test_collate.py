"""The tensors of a micro-batch, worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from tandem.data.batching.collate import Segment, collate, record_key
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin

from ..invariants.made import without_sharing

ORIGIN = Origin("made.jsonl", 1)


def branch(ids: list[int], trained: list[int]) -> Branch:
    return Branch(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


# prompt 1 2 3, shared answer token 4; chosen 5 6, rejected 7
PAIR = Example(
    branch([1, 2, 3, 4], [0, 0, 0, 1]),
    (branch([5, 6], [1, 1]), branch([7], [1])),
    ORIGIN,
)
# 11 12 | 13 14 trained | 15 not | 16 trained | 17 18 not
TALK = Example(
    branch([], []), (branch([11, 12, 13, 14, 15, 16, 17, 18], [0, 0, 1, 1, 0, 1, 0, 0]),), ORIGIN
)


def test_a_pair() -> None:
    batch = collate([PAIR])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.segments == (Segment(0, 5),)
    # 4 is predicted for both answers from row 2; 5 and 7 from row 3; 6 from row 4.
    assert batch.target_row.tolist() == [2, 3, 4, 2, 3]
    assert batch.target_id.tolist() == [4, 5, 6, 4, 7]
    assert batch.read_rows.tolist() == [2, 3, 4]
    assert batch.target_sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.sequence_tokens == (3, 2)
    assert batch.tokens == PAIR.fed == 5


def test_a_second_branch_starts_after_its_prefix() -> None:
    tree = Example(PAIR.prefix, (PAIR.branches[1], PAIR.branches[0]), ORIGIN)
    batch = collate([TALK, tree])
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 15, 1, 2, 3, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    # The one-token first branch feeds nothing; the second sees the prefix and itself.
    assert batch.segments == (Segment(0, 5), Segment(5, 9), Segment(9, 10, 5, 9))
    assert batch.target_row.tolist() == [1, 2, 4, 7, 8, 7, 8, 9]
    assert batch.target_id.tolist() == [13, 14, 16, 4, 7, 4, 5, 6]
    assert batch.target_sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_nothing_after_the_last_target_is_fed() -> None:
    assert TALK.fed == 5


def test_without_sharing_repeats_the_prefix() -> None:
    chosen, rejected = without_sharing(PAIR)
    assert chosen.branches[0].input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert rejected.branches[0].trained.tolist() == [False, False, False, True, True]
    batch = collate([chosen, rejected])
    assert batch.segments == (Segment(0, 5), Segment(5, 9))
    assert batch.target_id.tolist() == [4, 5, 6, 4, 7]


def test_dropout_keys_belong_to_the_record_not_to_its_place() -> None:
    keys = [record_key(1, 2, 30), record_key(1, 2, 31)]
    both = collate([TALK, PAIR], keys).dropout_keys
    alone = collate([PAIR], keys[1:]).dropout_keys
    assert both is not None
    assert alone is not None
    assert torch.equal(both[5:], alone)
    assert len(set(both.tolist())) == 10
    assert record_key(1, 3, 31) != keys[1] != record_key(2, 2, 31)
