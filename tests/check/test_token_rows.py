"""Rows of tokens as `tandem check` and `tandem show` see them: no texts, and lengths in tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Survey
from tandem.cli.main import main
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

from .made_data import write

_MANY = 2**31 - 1


def checked(file: Path, tokenizer: Any = None, kind: Any = "conversations", **more: Any) -> Survey:
    plan = EncodingOptions(kind, Limits(_MANY, None), "stop")
    target = CheckTarget(None, (DataSource(path=str(file)),), plan, 0.5)
    if tokenizer is not None:
        chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat"))
        target = replace(target, chat=chat, special=tuple(tokenizer.all_special_tokens))
    return survey(replace(target, **more))


def row(*ids: int, start: int = 2) -> dict[str, Any]:
    return {"input_ids": list(ids), "labels": [-100] * start + list(ids[start:])}


def findings(found: Survey) -> dict[str, int]:
    return {finding.sign.name: finding.count for finding in found.findings}


def test_lengths_are_those_of_the_tokens(tmp_path: Path, stories_tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [row(1, 5, 6, 7), row(1, 9, 6, 7, 8, 9), row(1, 600, 2)])
    found = checked(file, stories_tokenizer)
    assert found.counts == {"read": 3, "trained": 2, "truncated": 0, "dropped": 1}
    assert {name: (one.least, one.most) for name, one in found.measures.items()} == {
        "whole": (4, 6), "prompt": (2, 2), "answers": (2, 4),
    }  # fmt: skip
    assert findings(found) == {"dropped": 1}
    # Without a tokenizer ids are of any vocabulary, and characters are none.
    found = checked(file)
    assert (found.counts["trained"], found.measures, findings(found)) == (3, {}, {})
    assert found.problem is None


def test_a_recipes_limits_are_those_of_its_run(tmp_path: Path, stories_tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [row(1, 5, 6), row(1, 5, 6, 7, 8, 9)])
    for too_long, counts in (("keep_end", (2, 1, 0)), ("drop_old_turns", (1, 0, 1))):
        plan = EncodingOptions("conversations", Limits(5, None, too_long), "stop")  # type: ignore[arg-type]
        found = checked(file, stories_tokenizer, options=plan, limited=True)
        assert tuple(found.counts[key] for key in ("trained", "truncated", "dropped")) == counts
        assert found.measures["whole"].most == 6  # before anything is cut


def test_copies_are_found_and_pairs_the_other_way_round(
    tmp_path: Path, stories_tokenizer: Any
) -> None:
    rows = [row(1, 5, 6, 7), row(1, 5, 6, 8), row(1, 5, 6, 7), row(1, 5, 6, 7, start=3)]
    found = checked(write(tmp_path / "a.jsonl", rows), stories_tokenizer)
    # Other targets make another record.
    assert findings(found) == {"exact_duplicates": 1, "duplicate_prompts": 1}
    shown = next(one for one in found.findings if one.sign.name == "exact_duplicates").rows[0]
    assert (shown.row, shown.excerpt) == (3, "as row 1: tokens 1 5 6 7")
    pairs = [
        {"prompt_ids": [1, 5], "chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in (([6, 2], [7, 2]), ([7, 2], [6, 2]), ([7, 2], [6, 2]))
    ]
    file = write(tmp_path / "p.jsonl", pairs)
    found = checked(file, stories_tokenizer, "preference pairs")
    assert findings(found) == {"pairs_contradict": 2}


def test_pages_show_tokens(
    tmp_path: Path, stories_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [row(1, 5, 6, 7)])
    words = [str(file), "--model", str(stories_path), "--chat_template", "neural-chat"]
    assert main(["check", *words]) == 0
    out = capsys.readouterr().out
    assert "a.jsonl: tokens, conversations" in out
    assert "turns a record" not in out
    assert main(["show", *words, "--row", "1", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "the record: 4 tokens, 2 trained" in out
    assert "trained whole" in out
    assert main(["show", str(file), "--row", "1", "--text"]) == 0
    out = capsys.readouterr().out
    assert "prompt:\n  1 5\ntrained:\n  6 7\n" in out
