"""Raw text as `tandem check` and `tandem show` see it: its texts, and no lint of conversations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Survey
from tandem.cli.main import main
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.text.contamination import read_other
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

from .made_data import sentences, write
from .test_token_rows import findings

_MANY = 2**31 - 1


def text(seed: int, count: int = 6, more: str = "") -> dict[str, str]:
    import random

    return {"text": sentences(random.Random(seed), count) + more}


def checked(file: Path, tokenizer: Any = None, most: int = _MANY, **more: Any) -> Survey:
    plan = EncodingOptions("conversations", Limits(most, None), "stop", "text", documents=True)
    target = CheckTarget("sft", (DataSource(path=str(file)),), plan, 0.05, limited=most < _MANY)
    if tokenizer is not None:
        chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat"))
        target = replace(target, chat=chat, special=tuple(tokenizer.all_special_tokens))
    return survey(target, **more)


def test_texts_are_looked_at_and_lints_of_chats_are_not(
    tmp_path: Path, stories_tokenizer: Any
) -> None:
    # What would be findings in answers, or marks of a template in turns.
    odd = [
        text(90, more=" and then"), text(91, more="\n\n```python\nx"),
        text(92, more=" I'm sorry, but I can't help with that. As an AI"),
        text(93, more="\n\nHuman: who?\n\nAssistant: me"), text(94, more=" [INST] x [/INST]"),
    ]  # fmt: skip
    odd[0]["instruction"] = odd[0]["is_correct"] = "no"
    file = write(tmp_path / "a.jsonl", [*map(text, range(20)), *odd])
    assert findings(checked(file, stories_tokenizer)) == {"raw_text": 25}
    spoilt = [
        text(1, more="cafÃ©"), text(2, more="\ufffd"), text(3, more="AKIAIOSFODNN7EXAMPLQ"),
        text(4, more="</s>"), text(5), text(5), text(6, 40), text(6, 41),
    ]  # fmt: skip
    file = write(tmp_path / "b.jsonl", spoilt)
    assert findings(checked(file, stories_tokenizer)) == {
        "raw_text": 8, "mojibake": 1, "replacement_characters": 1, "secrets": 1,
        "special_tokens": 1, "exact_duplicates": 1, "near_duplicates": 1,
    }  # fmt: skip


def test_lengths_are_those_of_whole_documents(tmp_path: Path, stories_tokenizer: Any) -> None:
    rows = [text(1, 2), text(2, 30)]
    file = write(tmp_path / "a.jsonl", rows)
    sizes = [len(stories_tokenizer(row["text"])["input_ids"]) + 1 for row in rows]
    free = checked(file, stories_tokenizer)
    assert free.counts == {"read": 2, "trained": 2, "truncated": 0, "dropped": 0}
    cut = checked(file, stories_tokenizer, most=300)
    assert sizes[0] < 300 < sizes[1]
    assert cut.counts == {"read": 2, "trained": 2, "split": 1, "truncated": 0, "dropped": 0}
    assert findings(cut) == {"split": 1}
    for found in (free, cut):
        assert (found.measures["whole"].least, found.measures["whole"].most) == tuple(sizes)
        assert found.measures["prompt"].most == 1
    assert checked(file).measures["whole"].most == len(rows[1]["text"])


def test_words_of_an_evaluation_set_are_found(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [text(1), text(2)])
    other = write(tmp_path / "e.jsonl", [{"question": text(2)["text"], "answer": "x"}])
    found = checked(file, others=[read_other(DataSource(path=str(other)))])
    assert findings(found) == {"raw_text": 2, "shared_words": 1}


def test_pages_show_texts_and_pieces(
    tmp_path: Path, stories_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [text(1, 30), text(2)])
    words = [str(file), "--model", str(stories_path), "--chat_template", "neural-chat"]
    assert main(["check", *words]) == 0
    out = capsys.readouterr().out
    assert "a.jsonl: raw text, conversations" in out
    assert "SFT takes them with `loss_on: text`" in out
    assert "turns a record" not in out
    assert main(["show", *words, "--row", "2"]) == 0
    out = capsys.readouterr().out
    assert "the record: " in out
    assert "trained whole" in out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {stories_path}\noutput_dir: {tmp_path}/run\nchat_template: neural-chat\n"
        f"sft: {{data: {file}, loss_on: text, max_length: 400}}\n"
    )
    assert main(["show", "--recipe", str(recipe), "--row", "1", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "split: a text longer than max_length is split into pieces" in out
    assert "piece 1 of " in out
    assert "400 tokens, 399 trained" in out
    assert main(["check", "--recipe", str(recipe)]) == 0
    assert "1 split" in capsys.readouterr().out
    assert main(["show", str(file), "--row", "2", "--text"]) == 0
    assert f"text:\n  {text(2)['text']}\n" in capsys.readouterr().out
