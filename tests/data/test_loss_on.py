"""Loss on the whole text, by hand and beside plain transformers; weights of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tandem.data.batching.collate import collate
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.example import Branch
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.model.load_model import load_model
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.recipe.data_source import DataSource
from tandem.train.objectives.supervised import SupervisedObjective

from ..invariants.made import attend
from .built import prepare_conversations

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me of Tim."},
    {"role": "assistant", "content": "Tim had a ball.", "weight": 0},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "He was happy.", "weight": 1},
]


def prepared(
    tokenizer: Any, folder: Path, rows: list[Any], template: str, **options: Any
) -> tuple[EncodedDataset, Ledger]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(None)
    options.setdefault("max_length", 512)
    trees = prepare_conversations(
        [DataSource(path=str(file))],
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, template),
        ledger=ledger,
        **options,
    )
    return trees, ledger


def path_of(trees: EncodedDataset, number: int = 0) -> Branch:
    assert trees[number].prefix.input_ids.size == 0
    (branch,) = trees[number].branches
    return branch


def test_every_token_is_trained_but_the_first(byte_tokenizer: Any, tmp_path: Path) -> None:
    trees, _ = prepared(byte_tokenizer, tmp_path, [{"messages": TALK}], "chatml", loss_on="text")
    path = path_of(trees)
    plain = byte_tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert path.input_ids.tolist() == plain
    assert path.trained.tolist() == [False] + [True] * (len(plain) - 1)
    text = byte_tokenizer.decode(path.input_ids)
    assert text.endswith("He was happy.<|im_end|>\n")
    assert "Tim had a ball.<|im_end|>\n<|im_start|>user\n" in text


def test_weights_of_answers_count_in_messages_and_not_for_the_text(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    untrained = [TALK[1], {**TALK[2], "weight": 0}]
    rows = [{"messages": TALK}, {"messages": untrained}]
    trees, ledger = prepared(byte_tokenizer, tmp_path, rows, "chatml")
    assert len(trees) == 1
    path = path_of(trees)
    assert byte_tokenizer.decode(path.input_ids[path.trained]) == "He was happy.<|im_end|>"
    assert [(one.row, one.reason) for one in ledger.entries] == [(2, "every answer has weight 0")]
    trees, ledger = prepared(byte_tokenizer, tmp_path, rows, "chatml", loss_on="text")
    assert len(trees) == 2
    assert all(path_of(trees, i).trained[1:].all() for i in (0, 1))
    assert ledger.entries == []


def test_the_loss_is_that_of_plain_transformers(
    stories_tokenizer: Any, stories_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from tests.invariants.made import double_precision

    double_precision(monkeypatch)
    rows = [{"messages": TALK}, {"messages": [TALK[1], TALK[2]]}]
    trees, _ = prepared(stories_tokenizer, tmp_path, rows, "neural-chat", loss_on="text")
    plain = AutoModelForCausalLM.from_pretrained(stories_path, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for row in rows:
        ids = stories_tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            out = plain(input_ids=ids, labels=ids)
        # Its own loss, and the same in float64, for it passes logits through float32.
        exact = F.cross_entropy(out.logits[0, :-1], ids[0, 1:])
        assert out.loss.item() == pytest.approx(exact.item(), rel=1e-6)
        total += exact.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    model = load_model(stories_path, dtype=torch.float64)
    attend(model, "segments")
    with torch.no_grad():
        logps = sequence_logps(model, collate(list(trees)))
    objective = SupervisedObjective()
    assert objective.begin(list(trees), (0, 1)) == count
    part = objective.loss(logps, torch.ones_like(logps), (0, 1), first_step=False)
    assert float(part.loss) / count == pytest.approx(total / count, rel=1e-9)


def test_a_template_that_forgets_is_trained_as_it_renders_in_the_end(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    from tests.data.test_encode import REASONING

    file = tmp_path / "reasoning.jinja"
    file.write_text(REASONING)
    said = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>is</think>Hello"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>it</think>four"},
    ]
    trees, _ = prepared(byte_tokenizer, tmp_path, [{"messages": said}], str(file), loss_on="text")
    text = byte_tokenizer.decode(path_of(trees).input_ids)
    assert "<think>is" not in text
    assert "<think>it</think>four" in text


@pytest.mark.parametrize("policy", ["drop", "keep_start", "keep_end", "drop_old_turns"])
def test_the_text_is_shortened_by_policy(
    mistral_tokenizer: Any, tmp_path: Path, policy: str
) -> None:
    long = [{**turn, "content": turn["content"] + " w" * 30} for turn in TALK]  # type: ignore[operator]
    rows = [{"messages": long}, {"messages": TALK}]
    options = {"loss_on": "text", "max_length": 120, "too_long": policy}
    trees, ledger = prepared(mistral_tokenizer, tmp_path, rows, "neural-chat", **options)
    if policy == "drop":
        assert [tree.origin.row for tree in trees] == [2]
        assert ledger.entries[0].reason == "longer than max_length"
        return
    path = path_of(trees)
    assert len(path.input_ids) <= 120
    assert path.trained[1:].all()
    ended = path.input_ids[-1] == mistral_tokenizer.eos_token_id
    text = mistral_tokenizer.decode(path.input_ids)
    assert "Be brief." in text
    if policy == "keep_start":
        assert len(path.input_ids) == 120
        assert not ended
        assert "Tell me of Tim." in text
        assert ledger.entries[0].reason == "text cut"
    else:
        assert ended
        assert "He was happy." in text
        assert "Tell me" not in text


def test_an_answer_that_holds_the_end_token_is_no_text_to_train(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    bad = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "One.</s>Two"}]
    rows = [{"messages": bad}, {"messages": TALK}]
    _, ledger = prepared(mistral_tokenizer, tmp_path, rows, "neural-chat", loss_on="text")
    assert ledger.entries[0].reason == "the answer's text contains the end-of-turn token"
