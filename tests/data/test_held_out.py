"""Records held out by a hash of their prompts, and the prompts that two parts share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.batching.sampler import choose_held_out, shared_prompts
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.ledger import Ledger
from tandem.data.records import Conversation, Origin, Preference, Turn, prompt_key
from tandem.data.tokenize.chat_template import resolve_template
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations

WHERE = Origin("f", 1)


def keys(*prompts: int) -> np.ndarray:
    return np.array(prompts, dtype=np.uint64)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=80),
    st.floats(0.01, 0.9),
    st.integers(0, 2**32 - 1),
)
def test_no_prompt_is_in_both_parts(prompts: list[int], fraction: float, seed: int) -> None:
    array = keys(*prompts)
    counts = Counter(prompts)
    most = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    if min(counts.values()) > most:
        with pytest.raises(UserError, match="cannot be divided"):
            choose_held_out(array, fraction, seed)
        return
    held = choose_held_out(array, fraction, seed)
    assert 0 < held.sum() < len(array)
    assert held.sum() <= most
    assert not set(array[held].tolist()) & set(array[~held].tolist())
    backwards = choose_held_out(array[::-1], fraction, seed)[::-1]
    assert (backwards == held).all()


def test_a_fraction_of_different_prompts_is_exact_and_seeded() -> None:
    array = np.arange(1000, dtype=np.uint64)
    first = choose_held_out(array, 0.1, 1)
    assert first.sum() == 100
    assert (first == choose_held_out(array, 0.1, 1)).all()
    assert (first != choose_held_out(array, 0.1, 2)).any()


def test_one_prompt_alone_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="with 1 different prompts"):
        choose_held_out(keys(5, 5, 5), 0.5, 1)


def test_shared_prompts_are_counted_on_both_sides() -> None:
    assert shared_prompts(keys(1, 1, 2, 3), keys(1, 4, 3)) == (3, 2)
    assert shared_prompts(keys(1), keys(2)) == (0, 0)


def test_a_prompt_is_what_comes_before_the_first_trained_answer() -> None:
    def talk(*turns: Turn) -> Conversation:
        return Conversation(turns, WHERE)

    ask, other = Turn("user", "Two and two?"), Turn("user", "Three?")
    seven = Turn("assistant", "7")
    key = prompt_key(talk(ask, Turn("assistant", "4")))
    assert key == prompt_key(talk(ask, seven, other, seven))
    assert key == prompt_key(Preference((ask,), ("4", "5"), WHERE))
    assert key != prompt_key(talk(other, seven))
    assert key != prompt_key(talk(Turn("system", "Be brief."), ask, seven))
    untrained = Turn("assistant", "7", trained=False)
    assert prompt_key(talk(ask, untrained, other, seven)) != key
    # Texts cannot run into each other.
    assert prompt_key(talk(Turn("user", "ab"), Turn("user", "c"), seven)) != prompt_key(
        talk(Turn("user", "a"), Turn("user", "bc"), seven)
    )


def write(path: Path, talks: list[tuple[str, str]]) -> DataSource:
    lines = [{"prompt": question, "completion": answer} for question, answer in talks]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSource(path=str(path))


@pytest.mark.parametrize("kept", [True, False])
def test_records_know_their_source_and_prompt_and_can_be_selected(
    tmp_path: Path, mistral_tokenizer: Any, kept: bool
) -> None:
    long = "word " * 60
    a = write(tmp_path / "a.jsonl", [("Q1?", "x"), ("Q2?", ""), (long + "Q3?", "y"), ("Q4?", "z")])
    b = write(tmp_path / "b.jsonl", [(long + "Q3?", "y y y y"), ("Q1?", "other")])
    store = EncodedStore(print, tmp_path / "store") if kept else None

    def prepare() -> Any:
        return prepare_conversations(
            [a, b, a],
            tokenizer=mistral_tokenizer,
            template=resolve_template(mistral_tokenizer, "neural-chat"),
            max_length=40,
            ledger=Ledger(None),
            store=store,
        )

    for _ in range(2):  # found again
        trees = prepare()
        assert trees.sources == (3, 2, 3)
        # What was cut has the prompt of before.
        p = trees.prompts.tolist()
        assert p[1] == p[3]
        assert p[0] == p[4]
        assert p[:3] == p[5:]
        assert len(set(p)) == 3
        positions = np.array([1, 3, 4, 7])
        some = trees.select(positions)
        assert some.sources == (1, 2, 1)
        whole = list(trees)
        for made, position in zip(some, positions, strict=True):
            assert made.origin == whole[position].origin
            assert (made.branches[0].input_ids == whole[position].branches[0].input_ids).all()
        for name in (
            "fed", "branches", "prompts", "prefix_lengths", "sequence_lengths", "prompt_lengths"
        ):  # fmt: skip
            assert (getattr(some, name) == getattr(trees, name)[positions]).all()
        digests = trees.digests(0, 8)
        assert (some.digests(0, 4) == digests[positions]).all()
        assert (some.digests(1, 3) == digests[positions[1:3]]).all()
        assert len(some.digests(2, 2)) == 0
        assert some.select(np.array([2]))[0].origin == whole[4].origin
