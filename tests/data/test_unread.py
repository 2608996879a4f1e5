"""Which keys of a source nothing reads, as the ledger is told, from the rows and from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs
from .test_prepare import pair, talk, write
from .test_store import Desk, desk

__all__ = ["desk"]

TURNS = [{"who": "user", "said": "Why?"}, {"who": "assistant", "said": "So."}]


@pytest.mark.parametrize(
    ("row", "said", "unread"),
    [
        (talk("Why?", "So."), {}, ()),
        ({**talk("Why?", "So."), "tools": None, "system": "Be."}, {}, ()),
        ({**talk("Why?", "So."), "source": "web", "id": 3}, {}, ("id", "source")),
        (
            {"asked": "Why?", "answers": {"good": "So."}, "id": 1},
            {"fields": {"prompt": "asked", "completion": "answers.good"}},
            ("id",),
        ),
        (
            # `who` is a turn's; a column that is called so is another thing.
            {"log": TURNS, "who": "me"},
            {"fields": {"messages": "log", "role": "who", "content": "said"}},
            ("who",),
        ),
        # Read as what it is said to be, not as what it looks like.
        ({**talk("Why?", "So."), "label": True}, {"format": "messages"}, ("label",)),
        ({**talk("Why?", "So."), "label": True}, {}, ()),
    ],
)
def test_keys_that_nothing_reads_are_told(
    row: dict[str, Any], said: dict[str, Any], unread: tuple[str, ...], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [row]).model_copy(update=said)
    ledger = Ledger()
    assert len(list(read_conversations([source], ledger))) == 1
    assert ledger.unread == ({source.path: unread} if unread else {})
    assert ledger.summary()["unread_keys"] == ledger.unread


def test_the_first_row_of_the_format_tells_it(tmp_path: Path) -> None:
    rows: list[Any] = [{"note": 1}, {**talk("a", "b"), "id": 1}, {**talk("a", "b"), "more": 1}]
    ledger = Ledger()
    source = write(tmp_path / "a.jsonl", rows)
    assert len(list(read_conversations([source], ledger))) == 2
    assert ledger.unread == {source.path: ("id",)}


def test_rows_that_become_pairs_are_looked_at_as_they_were(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "Q", "completion": str(good), "label": good, "user": "u"}
        for good in (True, False)
    ]
    ledger = Ledger()
    source = write(tmp_path / "kto.jsonl", rows)
    assert len(list(read_pairs([source], ledger))) == 1
    assert ledger.unread == {source.path: ("user",)}


def test_one_place_read_twice_has_the_keys_of_both(tmp_path: Path) -> None:
    for split, key in (("train", "id"), ("test", "url")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({**talk("a", "b"), key: 1}) + "\n")
    sources = [DataSource(path=str(tmp_path), split=split) for split in ("train", "test")]
    ledger = Ledger()
    assert len(list(read_conversations(sources, ledger))) == 2
    assert ledger.unread == {str(tmp_path): ("id", "url")}


def test_a_second_start_tells_them_again(
    tmp_path: Path,
    mistral_tokenizer: Any,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = [
        write(tmp_path / "a.jsonl", [{**pair("Q", "A", "B"), "id": 1, "from": "x"}]),
        write(tmp_path / "b.jsonl", [pair("Q", "A", "B")]),
        write(tmp_path / "c.jsonl", [{**pair("Q", "A", "B"), "score": 0.5}]),
    ]
    told = {sources[0].path: ("from", "id"), sources[2].path: ("score",)}
    desk.prepare(sources, mistral_tokenizer)
    assert desk.ledger.unread == told
    summary = desk.ledger.summary()
    assert summary["unread_keys"] == told

    def encode(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("tandem.data.encoded.worker_pool.encode_chunk", encode)
    desk.prepare(sources, mistral_tokenizer)
    assert (desk.said, desk.ledger.summary()) == ([], summary)


@pytest.mark.parametrize("limit", [None, 1])
def test_what_is_only_held_in_memory_tells_them_too(
    limit: int | None,
    tmp_path: Path,
    mistral_tokenizer: Any,
    desk: Desk,
) -> None:
    desk.folder = tmp_path / "none"
    source = write(tmp_path / "a.jsonl", [{**talk("a", "b"), "id": n} for n in range(3)])
    trees = desk.prepare([source], mistral_tokenizer, prepare_conversations, limit=limit)
    assert len(trees) == (limit or 3)
    assert desk.ledger.unread == {source.path: ("id",)}
    with pytest.raises(Exception, match="preference pairs"):
        desk.prepare([source], mistral_tokenizer, prepare_pairs)
