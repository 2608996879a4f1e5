"""Rows of raw text: every token of a document is trained once, and nothing of it is lost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.batching.collate import collate
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.encode_documents import document_pieces, joined_pieces
from tandem.data.ledger import Ledger
from tandem.data.records import Document, Origin, prompt_key
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.light_tokenizer import read_light_tokenizer
from tandem.data.tokenize.template_capabilities import Refused
from tandem.errors import UserError
from tandem.model.load_model import load_model
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.recipe.data_source import DataSource

from ..invariants.made import attend
from .built import made_of, prepare, prepare_conversations, prepare_pairs

AT = Origin("a.jsonl", 1)
TEXTS = [
    "Tim had a red ball.\n\nHe was happy.",
    " Sue went home. " * 20,
    "Who? ### Human: me",
]


made = partial(made_of, loss_on="text")


def rows_of(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def ids_of(examples: Any) -> list[list[int]]:
    """The tokens of examples with one path each, of which all but the first are trained."""
    for example in examples:
        assert not len(example.prefix.input_ids)
        (branch,) = example.branches
        assert branch.trained.tolist() == [False] + [True] * (len(branch.input_ids) - 1)
    return [example.branches[0].input_ids.tolist() for example in examples]


@pytest.mark.parametrize("name", ["mistral_tokenizer", "stories_tokenizer", "byte_tokenizer"])
def test_a_document_is_the_tokenizers_ids_between_bos_and_eos(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tokenizer = request.getfixturevalue(name)
    found, ledger = made(tokenizer, tmp_path, rows_of(*TEXTS))
    plain = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert ids_of(found) == [[*bos, *ids, tokenizer.eos_token_id] for ids in plain]
    assert ledger.counts == {"read": 3, "trained": 3, "truncated": 0, "dropped": 0}
    assert list(ledger.formats.values()) == ["raw text"]


def test_bos_and_eos_that_are_there_are_not_doubled(mistral_tokenizer: Any, tmp_path: Path) -> None:
    found, _ = made(mistral_tokenizer, tmp_path, rows_of("<s>Tim", "Tim</s>", "Tim"))
    first, second, third = ids_of(found)
    assert second == third
    assert (first[0], first[1] == 1, first[-1]) == (1, False, 2)


@given(st.integers(2, 60), st.integers(2, 12))
def test_pieces_train_every_token_but_the_first_once(size: int, most: int) -> None:
    """By a plain loop over the pieces: where each target stands, and what it is predicted from."""
    ids = list(range(100, 100 + size))
    pieces = document_pieces(ids, most, AT)
    assert not isinstance(pieces, Refused)
    seen: list[int] = []
    for piece in pieces:
        branch = piece.branches[0]
        tokens = branch.input_ids.tolist()
        assert 2 <= len(tokens) <= most
        assert not branch.trained[0]
        for place in range(1, len(tokens)):
            assert branch.trained[place]
            assert tokens[place - 1] == tokens[place] - 1  # its neighbour in the document
            seen.append(tokens[place])
    assert seen == ids[1:]
    # As few pieces as possible.
    assert len(pieces) == -(-(size - 1) // (most - 1))
    joined = joined_pieces(pieces).branches[0]
    assert joined.input_ids.tolist() == ids
    assert int(joined.trained.sum()) == size - 1


def test_a_limit_that_holds_no_pair_of_tokens_drops_the_document(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nothing left to train: 1.*max_length 1"):
        made(stories_tokenizer, tmp_path, rows_of("Tim had a ball."), max_length=1)


@pytest.mark.parametrize("too_long", ["drop", "keep_start", "keep_end", "drop_old_turns"])
def test_a_long_document_is_split_and_counts_once(
    too_long: str, stories_tokenizer: Any, tmp_path: Path
) -> None:
    whole, _ = made(stories_tokenizer, tmp_path, rows_of(*TEXTS))
    found, ledger = made(
        stories_tokenizer, tmp_path, rows_of(*TEXTS), max_length=50, too_long=too_long
    )
    sizes = [len(one.branches[0].input_ids) for one in whole]
    parts = [-(-(size - 1) // 49) for size in sizes]
    assert parts[1] > 2
    assert ids_of(found) == [
        ids_of(whole)[number][start * 49 : start * 49 + 50]
        for number, count in enumerate(parts)
        for start in range(count)
    ]
    split = sum(count > 1 for count in parts)
    assert ledger.counts == {"read": 3, "trained": 3, "split": split, "truncated": 0, "dropped": 0}
    entry = next(entry for entry in ledger.entries if entry.row == 2)
    assert (entry.outcome, entry.detail) == (
        "split", f"{sizes[1]} tokens in {parts[1]} pieces, max_length 50",
    )  # fmt: skip


def test_splitting_loses_only_context(
    stories_path: Path, tmp_path: Path, stories_tokenizer: Any
) -> None:
    """A document's log-probs are those of plain transformers on its pieces, each target once."""
    model = load_model(stories_path, dtype=torch.float64)
    found, _ = made(stories_tokenizer, tmp_path, rows_of(TEXTS[1]), max_length=40)
    whole, _ = made(stories_tokenizer, tmp_path, rows_of(TEXTS[1]))
    ids = ids_of(whole)[0]
    expected = 0.0
    for start in range(0, len(ids) - 1, 39):
        piece = torch.tensor([ids[start : start + 40]])
        logits = model(piece, use_cache=False).logits[0, :-1]
        expected -= F.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    attend(model, "segments")
    with torch.no_grad():
        logps = sequence_logps(model, collate(list(found)), torch.float64)
    assert len(found) > 3
    assert logps.sum().item() == pytest.approx(expected, rel=1e-9)


def test_texts_and_conversations_train_together(stories_tokenizer: Any, tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    tokens = {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}
    sources = []
    for name, row in (("t", rows_of(TEXTS[1] * 4)[0]), ("m", talk), ("i", tokens)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        sources.append(DataSource(path=str(file)))
    ledger = Ledger(None)
    found = prepare_conversations(
        sources, tokenizer=stories_tokenizer, ledger=ledger, loss_on="text", max_length=150,
        template=resolve_template(stories_tokenizer, "neural-chat"),
    )  # fmt: skip
    assert list(ledger.formats.values()) == ["raw text", "messages", "tokens"]
    assert found.records == ledger.counts["trained"] == 3
    assert found.sources == (len(found) - 2, 1, 1)
    alone, _ = made(stories_tokenizer, tmp_path, [talk])
    assert found[len(found) - 2].branches[0].input_ids.tolist() == ids_of(alone)[0]


def test_what_is_kept_and_what_workers_make_is_the_same(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    rows = rows_of(*(TEXTS[number % 3] + f" {number}" for number in range(33 * 256)))
    expected, told = made(stories_tokenizer, tmp_path, rows, max_length=50)
    store = EncodedStore(lambda _: None, tmp_path / "cache")
    for _ in range(2):  # made by workers, then found
        found, ledger = made(
            stories_tokenizer, tmp_path, rows, max_length=50, workers=2, store=store
        )
        assert list(found.all_digests()) == list(expected.all_digests())
        assert (ledger.counts, ledger.entries) == (told.counts, told.entries)
        assert found.records == ledger.counts["trained"] == 33 * 256 < len(found)
    part = found.select(np.flatnonzero(found.prompts == prompt_key(Document(TEXTS[1] + " 1", AT))))
    assert (part.records, len(part)) == (1, len(ids_of(part)))
    assert len(part) > 2


def test_texts_in_a_table_under_another_name_are_the_same(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text('id,content\n1,"Tim had\na ball."\n2,\n')
    source = DataSource(path=str(tmp_path / "t.csv"), fields={"text": "content"})
    ledger = Ledger(None)
    found = prepare_conversations(
        [source], tokenizer=stories_tokenizer, max_length=512, ledger=ledger, loss_on="text",
        template=resolve_template(stories_tokenizer, "neural-chat"),
    )  # fmt: skip
    expected, _ = made(stories_tokenizer, tmp_path, rows_of("Tim had\na ball."))
    assert ids_of(found) == ids_of(expected)
    assert [entry.reason for entry in ledger.entries] == ["empty `text`"]


def test_a_limit_on_examples_counts_records(stories_tokenizer: Any, tmp_path: Path) -> None:
    whole, _ = made(stories_tokenizer, tmp_path, rows_of(*TEXTS), max_length=50)
    assert len(whole) > 4
    found, ledger = made(stories_tokenizer, tmp_path, rows_of(*TEXTS), max_length=50, limit=2)
    assert len(found) == 2
    assert ledger.counts["trained"] == found.records == 2


def test_the_light_tokenizer_gives_the_same(
    stories_path: Path, stories_tokenizer: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "byte")
    light = read_light_tokenizer(tmp_path / "byte")
    assert light is not None
    found = ids_of(made(light, tmp_path, rows_of(*TEXTS))[0])
    assert found == ids_of(made(byte_tokenizer, tmp_path, rows_of(*TEXTS))[0])


def test_a_tokenizer_without_eos_is_an_error(byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.eos_token = None
    template = resolve_template(byte_tokenizer, "chatml")
    with pytest.raises(UserError, match=r"row 1: raw text ends with the tokenizer's EOS token"):
        made(byte_tokenizer, tmp_path, rows_of("Tim"), template=template)


def test_a_text_that_is_none_is_dropped(stories_tokenizer: Any, tmp_path: Path) -> None:
    rows = [*rows_of("Tim", " \n"), {"text": None}, {"text": 3}, {"id": 4}]
    found, ledger = made(stories_tokenizer, tmp_path, rows)
    assert len(found) == 1
    assert [(one.row, one.reason) for one in ledger.entries] == [
        (2, "empty `text`"), (3, "`text` is null or missing"), (4, "`text` is not a text"),
        (5, "`text` is null or missing"),
    ]  # fmt: skip


def test_answers_cannot_be_trained_of_a_text_alone(stories_tokenizer: Any, tmp_path: Path) -> None:
    said = r"row 1: its `text` does not say what is asked.*`loss_on: text` in the recipe's sft"
    with pytest.raises(UserError, match=said):
        made(stories_tokenizer, tmp_path, rows_of("Tim"), loss_on="answers")
    with pytest.raises(
        UserError, match=r"holds raw text \(text\), but this stage trains on preference"
    ):
        made(stories_tokenizer, tmp_path, rows_of("Tim"), prepare_pairs, loss_on="answers")


def test_turns_beside_a_text_are_no_raw_text(stories_tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(UserError, match="But `log` holds turns"):
        made(stories_tokenizer, tmp_path, [{"text": "Hi Ho", "log": turns}])
    assert len(made(stories_tokenizer, tmp_path, [{"text": "Hi", "tags": ["a"]}])[0]) == 1


def test_no_kind_but_conversations_takes_texts(stories_tokenizer: Any, tmp_path: Path) -> None:
    def labelled(*arguments: Any, **named: Any) -> Any:
        return prepare("labelled answers", *arguments, **named)

    with pytest.raises(UserError, match="holds raw text"):
        made(stories_tokenizer, tmp_path, rows_of("Tim"), labelled, loss_on="answers")
