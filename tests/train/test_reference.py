"""The reference store: found by content, bounded, first value kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tandem.data.encoded.dataset import sequence_digest, to_arrays
from tandem.data.encoded.dataset_store import DatasetWriter
from tandem.data.encoded.encode_chunk import EncodedChunk
from tandem.data.encoded.example import Branch, Example, TokenIds, TrainedMask
from tandem.data.records import Origin
from tandem.storage.cache_folder import cache_report, clear_cache
from tandem.train.reference_logps import ReferenceStore, _key, _keys


def _sequence(ids: list[int], trained: list[int]) -> bytes:
    branch = Branch(ids_of(ids), mask_of(trained))
    halves = [Branch(branch.input_ids[a:b], branch.trained[a:b]) for a, b in ((0, 1), (1, None))]
    # Where a prefix ends is no part of what a sequence is.
    assert sequence_digest(*halves) == sequence_digest(branch, Branch(ids_of([]), mask_of([])))
    return sequence_digest(*halves)


def ids_of(ids: list[int]) -> TokenIds:
    return np.array(ids, dtype=np.int32)


def mask_of(trained: list[int]) -> TrainedMask:
    return np.array(trained, dtype=bool)


def test_keys_follow_weights_tokens_and_targets_alone() -> None:
    key = _key("weights", _sequence([1, 2, 3], [0, 1, 1]))
    assert key == _key("weights", _sequence([1, 2, 3], [0, 1, 1]))
    assert key != _key("other", _sequence([1, 2, 3], [0, 1, 1]))
    assert key != _key("weights", _sequence([1, 2, 4], [0, 1, 1]))
    assert key != _key("weights", _sequence([1, 2, 3], [0, 0, 1]))
    assert key != _key("weights", _sequence([1, 2, 3, 0], [0, 1, 1, 0]))


def test_what_is_stored_is_found_and_stays(tmp_path: Path) -> None:
    store = ReferenceStore(folder=tmp_path)
    keys = [bytes([i]) * 32 for i in range(3)]
    store.put(keys[:2], [-1.5, -2.5], [3, 4])
    store.put(keys[1:], [-9.0, -3.5], [4, 5])
    assert ReferenceStore(folder=tmp_path).get(keys) == dict(
        zip(keys, [-1.5, -2.5, -3.5], strict=True)
    )


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    store = ReferenceStore(folder=tmp_path)
    keys = [bytes([i]) * 32 for i in range(10)]
    for key in keys:
        store.put([key], [0.0], [1])
    store.get(keys[:3])
    assert store.prune(limit_bytes=5 * 80) == 5
    assert store.get(keys).keys() == {*keys[:3], *keys[8:]}


def test_the_cache_is_seen_and_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_report() == []
    ReferenceStore().put([b"k" * 32], [-1.0], [1])
    ((name, size),) = cache_report()
    assert (name, size > 0) == ("reference.sqlite", True)
    assert clear_cache() == size
    assert cache_report() == []


def test_keys_of_trees_on_disk_are_those_of_their_sequences() -> None:
    def branch(*ids: int) -> Branch:
        return Branch(ids_of(list(ids)), mask_of([token % 2 for token in ids]))

    made = [
        Example(branch(), (branch(1, 2, 3),), Origin("f", 1)),
        Example(branch(4, 5), (branch(6), branch(7, 8)), Origin("f", 2)),
        Example(branch(9), (branch(3), branch(2, 1)), Origin("f", 3)),
    ]
    writer = DatasetWriter(None, ["f"])
    writer.add(EncodedChunk("f", to_arrays(made), ()))
    writer.finish({}, [3])
    for block in (range(0, 3), range(1, 3), range(1, 2)):
        assert _keys("x", writer.dataset(), block) == _keys("x", made, block)
    whole = [[_key("x", sequence_digest(t.prefix, b)) for b in t.branches] for t in made]
    assert _keys("x", made, range(0, 3)) == whole
