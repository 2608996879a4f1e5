"""Declared shapes: which ones a run gets, and that filling micro-batches up changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tandem.data.batching.collate import Segment, collate, record_key, row_spans
from tandem.data.encoded.dataset import Bytes, EncodedDataset, Index, to_arrays
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.integrations.gaudi.static_shapes import (
    Bucket,
    Buckets,
    declare_buckets,
    fill_up,
    padding_share,
)


def make_pair(row: int, prefix: int, chosen: int, rejected: int, shared: int = 0) -> Example:
    """A pair whose prefix ends in `shared` targets."""

    def branch(length: int, trained: int) -> Branch:
        ids = np.arange(length, dtype=np.int32) + 3
        return Branch(ids, np.arange(length) >= length - trained)

    answers = (branch(chosen, chosen), branch(rejected, rejected))
    return Example(branch(prefix, shared), answers, Origin("pairs.jsonl", row))


def as_trees(trees: list[Example]) -> EncodedDataset:
    """The same records as a training run holds them."""
    c = to_arrays(trees)
    files = np.zeros(len(trees), dtype=np.int32)
    names = (trees[0].origin.file,)
    index = Index(
        c.parts,
        c.lengths,
        c.targets,
        c.fed,
        c.rows,
        files,
        c.prompts,
        c.scores,
        names,
        (len(trees),),
    )
    packed = np.packbits(c.trained)
    return EncodedDataset(
        index, Bytes(c.ids.tobytes()), Bytes(packed.tobytes()), Bytes(c.digests.tobytes())
    )


def test_a_filled_micro_batch_tensor_by_tensor() -> None:
    # P0 P1 P2 | C0 (C1) | (R0): P2 predicts C0 and R0, C0 predicts C1.
    batch = collate([make_pair(1, 3, 2, 1)], [record_key(1, 0, 0)])
    filled = fill_up(batch, Bucket(rows=6, targets=5, sequences=4))
    assert batch.input_ids.tolist() == [3, 4, 5, 3]
    assert filled.input_ids.tolist() == [3, 4, 5, 3, 0, 0]
    assert filled.position_ids.tolist() == [0, 1, 2, 3, 0, 0]
    assert filled.segments == (Segment(0, 4), Segment(4, 5), Segment(5, 6))
    assert filled.target_row.tolist() == [2, 3, 2, 0, 0]
    assert filled.target_id.tolist() == [3, 4, 3, 0, 0]
    assert filled.target_sequence.tolist() == [0, 0, 1, 4, 4], "slot 4 is thrown away"
    assert filled.sequences == 4
    assert filled.sequence_tokens == (2, 1, 0, 0)
    assert filled.read_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.dropout_keys is not None
    assert filled.dropout_keys is not None
    assert filled.dropout_keys[:4].equal(batch.dropout_keys)
    assert filled.record_tokens is not None
    assert filled.record_tokens.tolist() == [4, 4, 4, 4, 1, 1]
    assert filled.spans is not None
    assert filled.spans.tolist() == [[0, 0, 0, 0, 4, 5], [0] * 6, [0] * 6]


def test_what_does_not_fit_is_refused() -> None:
    batch = collate([make_pair(1, 3, 2, 1)])
    for bucket in (Bucket(3, 9, 9), Bucket(9, 2, 9), Bucket(9, 9, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            fill_up(batch, bucket)
    with pytest.raises(ValueError, match="at most 3 fit"):
        Buckets((Bucket(2, 2, 2), Bucket(3, 3, 2))).bucket_for(batch)


def test_spans_of_a_shared_prefix() -> None:
    segments = (Segment(0, 3), Segment(3, 5, 0, 2), Segment(5, 6))
    assert row_spans(segments).tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6, [0, 0, 0, 2, 2, 0]]


def test_auto_halves_the_budget_down() -> None:
    trees = as_trees([make_pair(1, 10, 5, 5)])
    rows = [s.rows for s in declare_buckets("auto", trees, budget=2000, max_length=64).shapes]
    assert rows == [256, 512, 1024, 2048]
    small = declare_buckets("auto", trees, budget=100, max_length=64)
    assert [shape.rows for shape in small.shapes] == [128]


def test_a_record_longer_than_the_budget_fits_as_well() -> None:
    trees = as_trees([make_pair(1, 10, 5, 5), make_pair(2, 400, 300, 200)])
    for asked in ("auto", "max"):
        declared = declare_buckets(asked, trees, budget=256, max_length=512)  # type: ignore[arg-type]
        assert declared.longest == 1024  # 400 + 299 + 199 rows, in multiples of 128


def test_pad_max_is_one_length() -> None:
    trees = as_trees([make_pair(1, 10, 5, 5)])
    declared = declare_buckets("max", trees, budget=100, max_length=1536)
    assert [shape.rows for shape in declared.shapes] == [1536]


def test_a_record_that_no_declared_length_holds_is_named() -> None:
    trees = as_trees([make_pair(1, 10, 5, 5), make_pair(7, 40, 30, 20)])
    with pytest.raises(Exception, match=r"pairs\.jsonl, row 7 feeds 88 tokens .* 16, 64") as error:
        declare_buckets((64, 16), trees, budget=64, max_length=64)
    assert "at least 88" in str(error.value)


def test_the_densest_micro_batches_fit() -> None:
    rng = np.random.default_rng(0)
    made = [make_pair(i, *(int(n) for n in rng.integers(1, 9, 3)), shared=0) for i in range(60)] + [
        make_pair(99, 6, 4, 4, shared=5)
    ]
    buckets = declare_buckets((64, 128), as_trees(made), budget=128, max_length=64)
    for tree in made:
        copies = [tree] * (128 // tree.fed)
        batch = collate(copies)
        filled = fill_up(batch, buckets.bucket_for(batch))
        assert (filled.tokens, len(filled.target_id)) in {
            (s.rows, s.targets) for s in buckets.shapes
        }
        assert filled.sequences % 2 == 0


def test_padding_is_counted_over_real_lengths() -> None:
    buckets = Buckets((Bucket(10, 10, 10), Bucket(20, 20, 20)))
    assert padding_share([10, 5, 15], buckets) == pytest.approx(10 / 40)
    assert padding_share([], buckets) == 0.0


def test_tensors_move_together() -> None:
    filled = fill_up(collate([make_pair(1, 3, 2, 1)], [5]), Bucket(8, 8, 4))
    moved = filled.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9
    assert all(tensor.is_meta for tensor in tensors)
    assert filled.to(torch.device("cpu")) is filled
