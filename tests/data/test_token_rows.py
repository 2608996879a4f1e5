"""Rows that are tokens already: the examples of the same texts, trained as they are, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.example import Example
from tandem.data.ledger import Ledger
from tandem.data.records import Origin, TokenPair, TokenRow
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.vocabulary import NoRow
from tandem.data.truncation.limits import Limits
from tandem.data.truncation.tokens import FittedTokens, fit_tokens
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from .built import made_of as made
from .built import prepare, prepare_conversations, prepare_pairs

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me of Tim."},
    {"role": "assistant", "content": "Tim had a ball."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "He was happy."},
]


def same(found: Any, expected: Any) -> bool:
    """Whether examples have the same tokens, targets, and scores, part by part."""

    def parts(example: Example) -> list[Any]:
        some = (example.prefix, *example.branches)
        own = [(part.input_ids.tolist(), part.trained.tolist()) for part in some]
        return [*own, example.scores]

    return list(map(parts, found)) == list(map(parts, expected))


def tokens_of(tokenizer: Any, talk: list[dict[str, str]]) -> dict[str, list[int]]:
    """A conversation's row of tokens, by transformers alone: answers with their end tokens."""
    apply, keep = tokenizer.apply_chat_template, {"return_dict": False}
    ids = apply(talk, **keep)
    labels = [-100] * len(ids)
    for place, turn in enumerate(talk):
        if turn["role"] == "assistant":
            start = len(apply(talk[:place], add_generation_prompt=True, **keep))
            stop = len(apply(talk[: place + 1], **keep))
            labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def test_tokens_of_messages_are_the_messages_examples(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    talks = [TALK, TALK[:3], TALK[1:3]]
    expected, _ = made(stories_tokenizer, tmp_path, [{"messages": talk} for talk in talks])
    rows = [tokens_of(stories_tokenizer, talk) for talk in talks]
    # What is behind the last answer influences nothing, and is left off.
    rows[2] = {key: [*ids, -100 if key == "labels" else 1] for key, ids in rows[2].items()}
    found, ledger = made(stories_tokenizer, tmp_path, rows)
    assert same(found, expected)
    assert ledger.counts == {"read": 3, "trained": 3, "truncated": 0, "dropped": 0}
    assert list(ledger.formats.values()) == ["tokens"]
    # Whatever else is trained on the whole text, here labels say it.
    assert same(made(stories_tokenizer, tmp_path, rows, loss_on="text")[0], expected)


def test_a_first_token_with_a_label_is_only_read(stories_tokenizer: Any, tmp_path: Path) -> None:
    found, ledger = made(stories_tokenizer, tmp_path, [{"input_ids": [1, 5], "labels": [1, 5]}])
    assert found[0].branches[0].trained.tolist() == [False, True]
    assert not ledger.entries


def pair_tokens(tokenizer: Any, question: str, *answers: str) -> list[list[int]]:
    apply, keep = tokenizer.apply_chat_template, {"return_dict": False}
    asked = [{"role": "user", "content": question}]
    prompt = apply(asked, add_generation_prompt=True, **keep)
    whole = [apply([*asked, {"role": "assistant", "content": one}], **keep) for one in answers]
    return [prompt, *(ids[len(prompt) :] for ids in whole)]


PAIRS = [("Who is Tim?", "Tim is a boy.", "Tim is a dog."), ("And Sue?", "A girl.", "No one.")]


@pytest.mark.parametrize("kind", ["preference pairs", "labelled answers"])
def test_tokens_of_pairs_are_the_pairs_examples(
    kind: Any, stories_tokenizer: Any, tmp_path: Path
) -> None:
    def make(*arguments: Any, **named: Any) -> Any:
        return prepare(kind, *arguments, **named)

    texts = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    expected, _ = made(stories_tokenizer, tmp_path, texts, make)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(keys, pair_tokens(stories_tokenizer, *pair), strict=True)) for pair in PAIRS]
    found, ledger = made(stories_tokenizer, tmp_path, rows, make)
    assert same(found, expected)
    assert [one.scores for one in found] == (
        [(1.0,), (0.0,)] * 2 if kind == "labelled answers" else [()] * 2
    )
    assert list(ledger.formats.values()) == ["token pairs"]


def test_tokens_beside_the_texts_they_were_made_of_are_what_is_trained(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    resolve_template(stories_tokenizer, "neural-chat")
    row = {"messages": TALK[1:3], "tools": [], **tokens_of(stories_tokenizer, TALK)}
    found, ledger = made(stories_tokenizer, tmp_path, [row])
    assert found[0].branches[0].input_ids.tolist() == row["input_ids"]
    assert list(ledger.unread.values()) == [("messages", "tools")]


SOUND = {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}
SOUND_PAIR = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [-100, 6, 7, 2, -100]}, "a label is neither -100 nor the id at its place"),
        ({"labels": [-100, -100, 6, 7, True]}, "a label is neither -100 nor the id at its place"),
        ({"labels": [-100, 6, 7, 2]}, "`labels` and `input_ids` have different lengths"),
        ({"labels": 1}, "`labels` is not a list of whole numbers"),
        ({"labels": [-100] * 5}, "no token is a target: all labels are -100"),
        ({"labels": [1, -100, -100, -100, -100]}, "only the first token is a target"),
        ({"input_ids": []}, "empty `input_ids`"),
        ({"input_ids": [1, 5.0, 6, 7, 2]}, "`input_ids` is not a list of whole numbers"),
        ({"input_ids": "[1, 5, 6, 7, 2]"}, "`input_ids` is not a list of whole numbers"),
        ({"input_ids": [1, -5, 6, 7, 2]}, "`input_ids` holds an id that no vocabulary has"),
        ({"input_ids": [1, 2**31, 6, 7, 2]}, "`input_ids` holds an id that no vocabulary has"),
        ({"attention_mask": [0, 1, 1, 1, 1]}, "`attention_mask` is not all ones"),
        ({"attention_mask": [1, 1]}, "`attention_mask` is not a list as long as `input_ids`"),
        ({"input_ids": [1, 512, 6, 7, 2]}, "an id that the tokenizer does not have"),
    ],
)
def test_a_bad_row_is_dropped_with_its_reason(
    change: dict[str, Any], reason: str, stories_tokenizer: Any, tmp_path: Path
) -> None:
    found, ledger = made(stories_tokenizer, tmp_path, [SOUND, {**SOUND, **change}])
    assert len(found) == 1
    ((row, said),) = [(one.row, one.reason) for one in ledger.entries]
    assert row == 2
    assert said.startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected_ids": [6, 2]}, "identical answers"),
        ({"prompt_ids": []}, "empty `prompt_ids`"),
        ({"chosen_ids": []}, "empty `chosen_ids`"),
        ({"chosen_ids": ["6"]}, "`chosen_ids` is not a list of whole numbers"),
        ({"rejected_ids": [600]}, "an id that the tokenizer does not have"),
        ({"rejected_ids": None}, "`rejected_ids` is null or missing"),
    ],
)
def test_a_bad_pair_is_dropped_with_its_reason(
    change: dict[str, Any], reason: str, stories_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [SOUND_PAIR, {**SOUND_PAIR, **change}]
    found, ledger = made(stories_tokenizer, tmp_path, rows, prepare_pairs)
    assert len(found) == 1
    assert [one.row for one in ledger.entries] == [2]
    assert ledger.entries[0].reason.startswith(reason)


def test_columns_of_a_table_under_other_names_are_the_same(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [SOUND, {"input_ids": [1, 9, 8], "labels": [-100, 9, 8]}]
    expected, _ = made(stories_tokenizer, tmp_path, rows)
    columns = {"ids": [one["input_ids"] for one in rows], "labels": [one["labels"] for one in rows]}
    kinds = pa.schema([("ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int64()))])
    pq.write_table(pa.table(columns, schema=kinds), tmp_path / "t.parquet")
    source = DataSource(path=str(tmp_path / "t.parquet"), fields={"input_ids": "ids"})
    found = prepare_conversations(
        [source], tokenizer=stories_tokenizer, max_length=512, ledger=Ledger(None),
        template=resolve_template(stories_tokenizer, "neural-chat"),
    )  # fmt: skip
    assert same(found, expected)


def test_ids_without_labels_are_no_format(stories_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`labels` beside them says which are trained"):
        made(stories_tokenizer, tmp_path, [{"input_ids": [1, 2]}])


def test_an_id_without_a_row_is_an_error_that_names_it(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    store = EncodedStore(lambda _: None, tmp_path / "cache")
    rows = [SOUND, {"input_ids": [1, 520], "labels": [-100, 520]}]
    # A model may have rows that the tokenizer has no tokens for.
    assert len(made(stories_tokenizer, tmp_path, rows, rows=600, store=store)[0]) == 1
    # Not from what was kept for a larger model, either.
    for more in ({}, {"store": store}):
        with pytest.raises(NoRow, match=r"rows.jsonl, row 2: the id 520 .*has 512 rows"):
            made(stories_tokenizer, tmp_path, rows, rows=512, **more)
    # One that neither has is the model's: another tokenizer made the rows.
    with pytest.raises(NoRow, match=r"row 1: the id 99999 .*the model's own tokenizer"):
        made(stories_tokenizer, tmp_path, [{"input_ids": [1, 99999], "labels": [-100, 99999]}],
             rows=512)  # fmt: skip


def test_workers_give_the_same(stories_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 3 + n % 400], "labels": [-100, 3 + n % 400]} for n in range(33 * 256)]
    pooled, _ = made(stories_tokenizer, tmp_path, rows, rows=512, workers=2)
    assert same(pooled[-300:], made(stories_tokenizer, tmp_path, rows[-300:])[0])
    rows[-1] = {"input_ids": [1, 777], "labels": [-100, 777]}
    with pytest.raises(NoRow, match=f"row {33 * 256}: the id 777"):
        made(stories_tokenizer, tmp_path, rows, rows=512, workers=2)


def test_a_template_that_ends_no_answer_is_an_error_of_turns_alone(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    byte_tokenizer.chat_template = None
    byte_tokenizer.eos_token = None
    template = resolve_template(byte_tokenizer, None)
    assert any("has no chat template" in notice for notice in template.notices)
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    found, _ = made(byte_tokenizer, tmp_path, [row], template=template)
    assert found[0].branches[0].input_ids.tolist() == [5, 6, 7]
    with pytest.raises(UserError, match=r"does not end an answer.*never stop"):
        made(byte_tokenizer, tmp_path, [{"messages": TALK}], template=template)


def fit(record: TokenRow | TokenPair, *limits: Any) -> tuple[Any, str]:
    """What is left of a record, and why; None where it is refused."""
    found = fit_tokens(record, Limits(*limits))
    return (found.record, found.reason) if isinstance(found, FittedTokens) else (None, found.reason)


AT = Origin("a.jsonl", 1)


def row(targets: str) -> TokenRow:
    """A row of as many tokens as characters: those under an x are targets."""
    return TokenRow(tuple(range(10, 10 + len(targets))), tuple(c == "x" for c in targets), AT)


def kept(found: Any) -> str:
    """The row's tokens by their last digit, targets in brackets."""
    pairs = zip(found.ids, found.trained, strict=True)
    return "".join(f"[{i % 10}]" if t else str(i % 10) for i, t in pairs)


@pytest.mark.parametrize(
    ("targets", "limits", "left", "reason"),
    [
        ("..xx..xx", (8, None), "01[2][3]45[6][7]", ""),
        ("..xx..xx", (7, None, "keep_start"), "01[2][3]45[6]", "end cut"),
        ("..xx..xx", (5, None, "keep_start"), "01[2][3]", "end cut"),
        ("..xx..xx", (7, None, "keep_end"), "1[2][3]45[6][7]", "beginning cut"),
        # A target that comes first is only read: nothing predicts it.
        ("..xx..xx", (6, None, "keep_end"), "2[3]45[6][7]", "beginning cut"),
        ("..xx..xx", (6, 1, "keep_end"), "2[3]45[6][7]", "beginning cut"),
        ("....xxxx", (7, 2, "keep_end"), "23[4][5][6][7]", "beginning cut"),
        ("....xxxx", (7, 1, "keep_start"), "3[4][5][6][7]", "beginning cut"),
        ("....xxxx", (3, 1, "keep_start"), "3[4][5]", "beginning cut and end cut"),
    ],
)
def test_a_long_row_loses_its_end_or_its_beginning(
    targets: str, limits: Any, left: str, reason: str
) -> None:
    found, why = fit(row(targets), *limits)
    assert (kept(found), why) == (left, reason)


@pytest.mark.parametrize(
    ("targets", "limits", "reason"),
    [
        ("..xx", (3, None), "too long, and tokens have no turns to drop"),
        ("..xx", (3, None, "drop"), "longer than max_length"),
        ("..xxxx", (4, None, "keep_end"), "the answer alone is longer than max_length"),
        ("....xx", (4, None, "keep_start"), "nothing left to train"),
    ],
)
def test_a_long_row_that_cannot_be_cut_is_refused(targets: str, limits: Any, reason: str) -> None:
    found, why = fit(row(targets), *limits)
    assert found is None
    assert why.startswith(reason)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((7, None), ("0123", "456", "78", "")),
        ((6, None), ("", "", "", "too long, and tokens have no turns to drop")),
        ((9, 2), ("", "", "", "too long, and tokens have no turns to drop")),
        ((6, None, "drop"), ("", "", "", "longer than max_length")),
        ((9, 2, "drop"), ("", "", "", "prompt longer than max_prompt_length")),
        ((6, None, "keep_start"), ("0123", "45", "78", "answer cut")),
        ((4, None, "keep_start"), ("", "", "", "nothing left to train")),
        ((6, None, "keep_end"), ("123", "456", "78", "prompt cut")),
        ((9, 2, "keep_end"), ("23", "456", "78", "prompt cut")),
        ((4, 2, "keep_start"), ("23", "45", "78", "prompt cut and answer cut")),
        ((3, None, "keep_end"), ("", "", "", "the answer alone is longer than max_length")),
    ],
)
def test_a_long_pair_is_cut_as_pairs_are(limits: Any, expected: tuple[str, ...]) -> None:
    pair = TokenPair((0, 1, 2, 3), (4, 5, 6), (7, 8), AT)
    found, why = fit(pair, *limits)
    parts = (found.prompt, found.chosen, found.rejected) if found else ((),) * 3
    *left, reason = expected
    assert ["".join(map(str, part)) for part in parts] == left
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


def test_answers_that_are_the_same_once_cut_are_no_pair() -> None:
    pair = TokenPair((0, 1), (4, 5, 6), (4, 5, 7), AT)
    assert fit(pair, 4, None, "keep_start") == (None, "nothing left to train")


def test_a_cut_row_is_in_the_ledger(stories_tokenizer: Any, tmp_path: Path) -> None:
    rows = [SOUND, SOUND_PAIR]
    found, ledger = made(stories_tokenizer, tmp_path, rows[:1], max_length=4, too_long="keep_end")
    assert found[0].branches[0].input_ids.tolist() == [5, 6, 7, 2]
    (entry,) = ledger.entries
    assert (entry.outcome, entry.reason, entry.detail) == (
        "truncated", "beginning cut", "sequence 5 -> 4 tokens",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"keep_start or keep_end cuts them"):
        made(stories_tokenizer, tmp_path, rows[:1], max_length=4)
