"""What a run does not read: keys of rows and turns, verdicts, and what belongs to the texts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.check.check_page import as_json, print_survey
from tandem.check.column_signs import verdict_sign
from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Survey
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.formats.format import Kind
from tandem.data.formats.known_formats import format_called
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

from .made_data import conversation, pair, write

ASKED, ANSWERED = "Why is the river wide?", "It has come a long way from the hills."


def _survey(
    file: Path, kind: Kind = "conversations", fields: dict[str, str] | None = None
) -> Survey:
    plan = EncodingOptions(kind, Limits(2**31 - 1, None), "stop")
    return survey(CheckTarget(None, (DataSource(path=str(file), fields=fields or {}),), plan, 0.05))


def _said(found: Survey, name: str) -> dict[str, list[tuple[int, str]]]:
    return {
        finding.sign.about: [(e.row, e.excerpt) for e in finding.rows]
        for finding in found.findings
        if finding.sign.name == name
    }


def _beside(tmp_path: Path, *columns: dict[str, Any], **row: Any) -> Survey:
    """A survey of clean rows with these columns beside, one row for each."""
    rows = [{**(row or conversation(seed)), **more} for seed, more in enumerate(columns)]
    return _survey(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("is_safe", True, False),
        ("is_desirable", True, False),
        ("is_correct", 1, 0),
        ("correct", "true", "false"),
        ("is_response_accepted", "1", "0"),
        ("preferred", "yes", "no"),
        ("tests_passed", 1.0, 0.0),
        ("unsafe", False, True),
        ("correctness", True, False),
    ],
)
def test_a_verdict_that_is_not_read(column: str, good: Any, bad: Any, tmp_path: Path) -> None:
    found = _beside(tmp_path, {column: good}, {column: bad}, {column: None}, {"source": "x"})
    (finding,) = found.findings
    assert (finding.sign.name, finding.sign.about) == ("verdict_not_read", column)
    assert (finding.sign.severity, finding.count, finding.of) == ("warning", 1, 4)
    (row,) = finding.rows
    assert row.row == 2
    answer = conversation(1)["messages"][1]["content"]
    assert row.excerpt.startswith(f"{column}: {str(bad).lower()} | {answer[:40]}")
    assert f"--fields label={column}" in finding.sign.hint


@pytest.mark.parametrize(
    "columns",
    [
        # Classes, grades and other things.
        {"label": 0}, {"label": "no"}, {"correctness": 0}, {"correct_answers": False},
        {"is_english": False}, {"safe_mode": False}, {"good_natured": False}, {"score": -2},
        {"label_source": False}, {"is_safe": []}, {"is_safe": 0.5}, {"unsafe": False},
        {"correctness_math_verify": [False]},
    ],
)  # fmt: skip
def test_what_is_no_verdict_of_a_bad_answer(columns: dict[str, Any], tmp_path: Path) -> None:
    assert not _beside(tmp_path, columns).findings


def test_a_tag_is_read_or_missed(tmp_path: Path) -> None:
    row = {"instruction": ASKED, "output": ANSWERED, "kto_tag": False}
    (finding,) = _survey(write(tmp_path / "a.jsonl", [row])).findings
    assert finding.sign.name in ("verdict_not_read", "dropped")


@pytest.mark.parametrize(
    ("column", "layout", "advice"),
    [
        ("is_good", "messages", "say --fields label=is_good, which makes the set labelled mess"),
        ("is_good", "ShareGPT", "say --fields label=is_good, which makes the set labelled Share"),
        ("is_good", "prompt and completion", "label=is_good, which makes the set unpaired pref"),
        ("label", "prompt and completion", "or say --format unpaired-preference."),
        ("is_good", "prompt and response", "which makes the set labelled prompt and response."),
        ("label", "Alpaca", "or say --format labelled-Alpaca."),
        ("is_good", "question and response", "with --fields"),
    ],
)
def test_a_verdict_has_advice_that_suits_the_format(column: str, layout: str, advice: str) -> None:
    assert advice in verdict_sign(column, format_called(layout)).hint


def test_where_the_format_has_a_label_that_is_all_there_is_to_name() -> None:
    known = format_called("labelled messages")
    assert verdict_sign("is_good", known).hint.endswith("or say --fields label=is_good.")


def test_a_verdict_that_is_read_or_beside_a_pair_is_none(tmp_path: Path) -> None:
    labelled = [
        {"prompt": ASKED, "completion": ANSWERED, "label": True},
        {"prompt": ASKED, "completion": "No idea at all.", "label": False},
    ]
    found = _survey(write(tmp_path / "a.jsonl", labelled))
    assert {finding.sign.name for finding in found.findings} == {"dropped"}
    beside = {**pair(1), "is_correct": False}
    assert not _survey(write(tmp_path / "b.jsonl", [beside]), "preference pairs").findings


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("history", [["Hello?", "Good day."]], "Good day."),
        ("system_prompt", "Answer like a pirate.", "Answer like a pirate."),
        ("system_message", "Be brief.", "Be brief."),
        ("image", "coco/a.jpg", "coco/a.jpg"),
        ("images", [{"bytes": "aGk=", "path": None}], "[{'bytes': 'aGk=', 'path': None}]"),
        ("audio_path", "a.wav", "a.wav"),
        ("choices", ["a", "b"], "a"),
        ("options", {"A": "seven", "B": "eleven"}, "eleven"),
        ("context", "The hills are far away.", "The hills are far away."),
        ("chat_template_kwargs", {"enable_thinking": False}, "{'enable_thinking': False}"),
        ("rejected_response", "Go away.", "Go away."),
        ("response_rejected", [{"role": "assistant", "content": "Go away."}], "Go away."),
        ("Complex_CoT", "First I look at the map.", "First I look at the map."),
        ("thinking_trajectories", ["Hm."], "Hm."),
        ("model-reasoning", "Hm.", "Hm."),
        ("thought", "Hm.", "Hm."),
    ],
)  # fmt: skip
def test_what_belongs_to_the_texts_and_is_not_read(
    column: str, value: Any, shown: str, tmp_path: Path
) -> None:
    empty = [{column: None}, {column: type(value)()}]
    found = _beside(tmp_path, *empty, {column: value})
    (finding,) = found.findings
    assert (finding.sign.name, finding.sign.about) == ("meaning_not_read", column)
    assert (finding.sign.severity, finding.count) == ("warning", 1)
    assert [(e.row, e.excerpt) for e in finding.rows] == [(3, f"{column}: {shown}")]


@pytest.mark.parametrize(
    "columns",
    [
        {"reasoning": "off"}, {"reasoning_model": "gpt"}, {"reasoning_language": "English"},
        {"cot_type": "math"},
        {"is_reasoning_complete": [True, False]}, {"thinking_tokens": 700}, {"reasoning": None},
        {"scottish": "aye"}, {"thoughtful": "It is."}, {"judge_reasoning": "B is better."},
        {"images": []}, {"images": 0}, {"images": [None]}, {"image_size": "large"},
        {"chat_template_kwargs": {}}, {"chat_template_kwargs": {"tools": []}},
        {"rejected_model": "gpt"}, {"rejected_score": 3}, {"is_rejected": True},
        {"context_length": "long"}, {"history": [[]]}, {"system_prompt": "  "},
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_texts(columns: dict[str, Any], tmp_path: Path) -> None:
    assert not _beside(tmp_path, columns).findings


def test_what_is_in_the_texts_as_well_is_not_missed(tmp_path: Path) -> None:
    answer = f"<think>{ANSWERED}</think> It is 12, the distance."
    question = f"{ASKED} A. 7 B. 12 C. none of these"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    beside = {
        "system_prompt": "Be brief.", "choices": ["7", "12", "none of these"],
        "thinking": f" {ANSWERED}\n",
    }  # fmt: skip
    assert not _beside(tmp_path, beside, messages=turns).findings
    # Two letters of a word are not one of the choices.
    found = _beside(tmp_path, {"choices": ["7", "di"]}, messages=turns)
    assert _said(found, "meaning_not_read") == {"choices": [(1, "choices: di")]}


@pytest.mark.parametrize(
    ("row", "column", "value", "advice"),
    [
        ({"messages": conversation(1)["messages"]}, "system_prompt", "Be brief.",
         "--fields system=system_prompt"),
        ({"instruction": ASKED, "output": ANSWERED}, "context", "A map.", "--fields input=context"),
        ({"query": ASKED, "response": ANSWERED}, "choices", ["north", "south"],
         "write it into the texts"),
        ({"query": ASKED, "response": ANSWERED}, "rejected_response", "No.", "for DPO name"),
        ({"query": ASKED, "response": ANSWERED}, "image", "a.png", "Only text is trained"),
    ],
)  # fmt: skip
def test_what_is_not_read_has_advice_that_suits_the_format(
    row: dict[str, Any], column: str, value: Any, advice: str, tmp_path: Path
) -> None:
    (finding,) = _survey(write(tmp_path / "a.jsonl", [{**row, column: value}])).findings
    assert advice in finding.sign.hint
    if "=" in advice:
        key = advice.split()[1].partition("=")[0]
        named = _survey(tmp_path / "a.jsonl", fields={key: column})
        assert not named.findings


def test_beside_pairs_reasoning_is_a_judges_unless_it_is_an_answers(tmp_path: Path) -> None:
    rows = [
        {**pair(1), "reasoning": "Chosen is better.", "rejected_response": "No."},
        {**pair(2), "chosen_reasoning": "First the map.", "images": ["a.png"]},
    ]
    found = _survey(write(tmp_path / "a.jsonl", rows), "preference pairs")
    assert set(_said(found, "meaning_not_read")) == {"chosen_reasoning", "images"}


def test_keys_of_turns_that_a_run_ignores_are_listed(tmp_path: Path) -> None:
    call = [{"function": {"name": "f", "arguments": {}}}]
    turns = [
        {"role": "user", "content": "Q", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call, "thought": "Hm.", "mask": 1},
        {"role": "tool", "content": "1", "name": "f", "tool_call_id": "x", "is_error": False},
        {"role": "assistant", "content": "A", "thinking": "So.", "weight": 1},
    ]
    rows = [{"messages": turns, "source": "a", "tools": [{"name": "f", "strict": True}]}]
    found = _survey(write(tmp_path / "a.jsonl", rows * 2))
    listed = (
        "messages[].is_error", "messages[].mask", "messages[].name", "messages[].thought", "source",
    )  # fmt: skip
    assert found.unread == listed
    assert as_json(found)["unread_keys"] == list(listed)
    out = StringIO()
    print_survey(Console(file=out, width=100), found, None)
    assert f"\nkeys that are not read: {', '.join(listed)}\n" in out.getvalue()


def test_keys_of_turns_are_looked_at_wherever_turns_are(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Q", "id": 1}, {"from": "gpt", "value": "A", "id": 2}]
    assert _survey(write(tmp_path / "a.jsonl", [{"conversations": said}])).unread == (
        "conversations[].id",
    )
    exchange = [{"input": "Q", "output": "A", "topic": "x"}]
    assert _survey(write(tmp_path / "b.jsonl", [{"conversation": exchange}])).unread == (
        "conversation[].topic",
    )
    answers = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": {"role": "assistant", "content": "A", "toxic": False},
        "rejected": [{"role": "assistant", "content": "B"}],
    }
    found = _survey(write(tmp_path / "c.jsonl", [answers]), "preference pairs")
    assert found.unread == ("chosen[].toxic",)
    # Objects that are no turns have keys of their own.
    scored = [{"response": a, "overall_score": s, "model": "x"} for a, s in (("A", 2), ("B", 1))]
    row = {"instruction": "Q", "completions": scored}
    assert _survey(write(tmp_path / "d.jsonl", [row]), "preference pairs").unread == ()
    # A recipe's names of a turn's keys are read.
    log = [{"who": "user", "said": "Q", "at": 1}, {"who": "assistant", "said": "A", "at": 2}]
    file = write(tmp_path / "e.jsonl", [{"log": log}])
    names = {"messages": "log", "role": "who", "content": "said"}
    assert _survey(file, fields=names).unread == ("messages[].at",)


def test_what_a_sources_names_lead_into_is_read_of_that_source_alone(tmp_path: Path) -> None:
    led = write(tmp_path / "a.jsonl", [{"q": {"text": ASKED}, "completion": ANSWERED}])
    plain = write(tmp_path / "b.jsonl", [{"prompt": ASKED, "completion": ANSWERED, "q": 1}])
    sources = (DataSource(path=str(led), fields={"prompt": "q.text"}), DataSource(path=str(plain)))
    plan = EncodingOptions("conversations", Limits(2**31 - 1, None), "stop")
    assert survey(CheckTarget(None, sources[:1], plan, 0.05)).unread == ()
    assert survey(CheckTarget(None, sources, plan, 0.05)).unread == ("q",)


def test_keys_of_a_row_of_another_format_are_not_called_unread(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASKED, "completion": ANSWERED, "id": 1},
        {"messages": [], "other": 1},
        {"prompt": ASKED, "completion": "", "answer": ANSWERED},
    ]
    assert _survey(write(tmp_path / "a.jsonl", rows)).unread == ("answer", "id")


def test_keys_beside_labelled_answers_are_listed(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Q", "mood": 1}]
    rows = [
        {"prompt": asked, "completion": "good", "label": True, "note": "x"},
        {"prompt": asked, "completion": "bad", "label": False, "rater": {"of": "y"}},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    listed = ("note", "prompt[].mood", "rater")
    assert _survey(file, "preference pairs").unread == listed
    # Under other names as well, of which those that lead into a key read it.
    named = write(tmp_path / "b.jsonl", [{**rows[0], "label": 1, "rater": {"of": True}}, rows[1]])
    fields = {"label": "rater.of"}
    assert _survey(named, "preference pairs", fields).unread == ("note", "prompt[].mood")
    # With a limit, those of the rows that were looked at.
    plan = EncodingOptions("preference pairs", Limits(2**31 - 1, None), "stop")
    found = survey(CheckTarget(None, (DataSource(path=str(file)),), plan, 0.05), limit=1)
    assert found.unread == ("note", "prompt[].mood")


def test_a_long_list_of_keys_is_cut_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**conversation(seed), f"key{seed:02}": 1} for seed in range(30)]
    file = write(tmp_path / "a.jsonl", rows)

    def line(found: Survey) -> str:
        out = StringIO()
        print_survey(Console(file=out, width=100), found, None)
        return out.getvalue().splitlines()[1]

    found = _survey(file)
    assert line(found).endswith("key18, key19, and 10 more (--json lists them)")
    assert (len(as_json(found)["unread_keys"]), as_json(found)["unread_keys_cut"]) == (30, False)
    monkeypatch.setattr("tandem.check.unread_keys._MOST", 25)
    found = _survey(file)
    assert line(found).endswith("key18, key19, and more than 5 more (--json lists 25)")
    assert (len(as_json(found)["unread_keys"]), as_json(found)["unread_keys_cut"]) == (25, True)


def test_rows_with_endless_sets_of_keys_need_no_endless_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.check.column_signs._REMEMBERED", 3)
    rows: list[Any] = [{**conversation(seed), f"key{seed:02}": 1} for seed in range(20)]
    for number, row in enumerate(rows):
        row["messages"][1][f"own{number:02}"] = 1
    rows.append({**conversation(20), "is_safe": False})
    found = _survey(write(tmp_path / "a.jsonl", rows))
    assert len(found.unread) == 41
    assert json.loads(json.dumps(as_json(found)))["unread_keys"] == sorted(found.unread)
    assert list(_said(found, "verdict_not_read")) == ["is_safe"]
