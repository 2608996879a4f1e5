"""Columns that say which answer is the better one, in words of their own or of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.check.column_signs import column_signs, scores_in
from tandem.check.column_words import side_columns, sides_of
from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.records import Origin, Preference, Turn
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

from .made_data import pair, write

NUMBERED = (("chosen", "response_0"), ("rejected", "response_1"))
COUNTED = (("chosen", "response1"), ("rejected", "response2"))
LETTERED = (("chosen", "response_a"), ("rejected", "response_b"))
CAPITALS = (("chosen", "human_ref_A"), ("rejected", "human_ref_B"))
WORDS = (("chosen", "answers.good"), ("rejected", "answers.bad"))
ONE_MORE = (("chosen", "response"), ("rejected", "response_2"))

_PAIR = Preference((Turn("user", "Why?"),), ("Because.", "No idea."), Origin("a.jsonl", 1))


def _found(fields: dict[str, Any], names: tuple[tuple[str, str], ...] = ()) -> list[str]:
    beside = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
    return [sign.name for sign, _ in column_signs(beside | fields, _PAIR, sides_of(names))]


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ((), {"better_response_id": "rejected"}),
        ((), {"preferred_answer": "Rejected"}),
        ((), {"winner": "rejected_response"}),
        ((), {"best_answer": "No idea."}),
        ((), {"chosen_id": "rejected"}),
        ((), {"chosen_safe": False, "rejected_safe": True}),
        (NUMBERED, {"better_response_id": 1}),
        (NUMBERED, {"safer_response_id": "1"}),
        (NUMBERED, {"better_response_id": "response_1"}),
        (NUMBERED, {"is_response_0_safe": False, "is_response_1_safe": True}),
        (COUNTED, {"preferred": 2}),
        (LETTERED, {"preferred": "b"}),
        (LETTERED, {"preferred": "B"}),
        (LETTERED, {"winner": "model_b"}),
        (LETTERED, {"winner": "Response B"}),
        (CAPITALS, {"choice": "B"}),
        (WORDS, {"label": "bad"}),
        (ONE_MORE, {"preferred": "response_2"}),
    ],
)  # fmt: skip
def test_a_column_that_names_the_rejected_answer(
    names: tuple[tuple[str, str], ...], fields: dict[str, Any]
) -> None:
    assert _found(fields, names) == ["label_prefers_rejected"]


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ((), {"better_response_id": "chosen"}),
        ((), {"better_response_id": 1}),
        ((), {"best_answer": "Because."}),
        ((), {"label": True}),
        ((), {"chosen_model": "rejected"}),
        ((), {"status": "rejected"}),
        (NUMBERED, {"better_response_id": 0}),
        (NUMBERED, {"better_response_id": True}),
        (NUMBERED, {"label": 1}),
        (NUMBERED, {"preference": 1}),
        (NUMBERED, {"is_response_0_safe": True, "is_response_1_safe": True}),
        (NUMBERED, {"is_response_0_better": 1, "is_response_1_better": 0}),
        # HelpSteer: a strength, and a scale.
        (COUNTED, {"preference_strength": 2}),
        (COUNTED, {"overall_preference": 2}),
        (LETTERED, {"preferred": "a"}),
        (LETTERED, {"winner": "neither"}),
        # SHP: 1 says that A is better.
        (CAPITALS, {"labels": 0}),
        (ONE_MORE, {"preferred": "response"}),
        (ONE_MORE, {"preferred": 2}),
    ],
)  # fmt: skip
def test_a_column_that_names_the_chosen_answer_or_none(
    names: tuple[tuple[str, str], ...], fields: dict[str, Any]
) -> None:
    assert _found(fields, names) == []


@pytest.mark.parametrize(
    ("names", "fields", "found"),
    [
        (CAPITALS, {"score_A": 3, "score_B": 30}, ["chosen_scored_lower"]),
        (CAPITALS, {"score_A": 30, "score_B": 3}, []),
        (CAPITALS, {"created_at_utc_A": 1, "created_at_utc_B": 2}, []),
        (NUMBERED, {"score_0": -1.0, "score_1": 1.0}, ["chosen_scored_lower"]),
        (LETTERED, {"winner_model_a": 0, "winner_model_b": 1}, ["chosen_scored_lower"]),
        (NUMBERED, {"response_0_severity_level": 0, "response_1_severity_level": 3}, []),
        ((), {"score_A": 3, "score_B": 30}, []),
    ],
)  # fmt: skip
def test_scores_under_the_names_of_the_data(
    names: tuple[tuple[str, str], ...], fields: dict[str, Any], found: list[str]
) -> None:
    assert _found(fields, names) == found


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"score_chosen": 8.0, "score_rejected": 8}, ["equal_scores"]),
        ({"status": "tie"}, ["equal_scores"]),
        ({"winner": "tie (bothbad)"}, ["equal_scores"]),
        ({"winner_tie": 1}, ["equal_scores"]),
        ({"winner_tie": 0}, []),
        ({"status": "unchanged"}, []),
        # Numbers that are alike by nature.
        ({"chosen_turns": 2, "rejected_turns": 2}, []),
        # Another score decides.
        ({"score_chosen": 8, "score_rejected": 8, "chosen_rating": 5, "rejected_rating": 1}, []),
        (
            {"score_chosen": 8, "score_rejected": 8, "chosen_rating": 1, "rejected_rating": 5},
            ["chosen_scored_lower"],
        ),
    ],
)  # fmt: skip
def test_answers_that_are_scored_alike(fields: dict[str, Any], found: list[str]) -> None:
    assert _found(fields) == found


def test_columns_that_score_both_answers() -> None:
    fields = {
        "chosen": "a", "rejected": "b", "chosen-rating": 4, "rejected-rating": 5.0,
        "score_chosen": 1, "score_rejected": "2", "chosen_rank": 1, "rejected_rank": 2,
        "chosen_tokens": 5, "rejected_tokens": 9, "is_chosen": True, "is_rejected": False,
    }  # fmt: skip
    columns = side_columns(tuple(fields), sides_of(()))
    assert scores_in(fields, columns) == [("chosen-rating", "rejected-rating", 4, 5.0, True)]


@pytest.mark.parametrize("limit", [None, 7])
def test_reversed_rows_are_found_where_a_recipe_names_the_answers(
    limit: int | None, tmp_path: Path
) -> None:
    rows = []
    for seed in range(10):
        made = pair(seed)
        answers = {"response_0": made["chosen"], "response_1": made["rejected"]}
        rows.append({"prompt": made["prompt"], **answers, "better_response_id": int(seed == 5)})
    spec = DataSource(path=str(write(tmp_path / "a.jsonl", rows)), fields=dict(NUMBERED))
    other = DataSource(path=str(write(tmp_path / "b.jsonl", map(pair, range(20, 30)))))
    plan = EncodingOptions("preference pairs", Limits(2**31 - 1, None), "stop")
    found = survey(CheckTarget(None, (spec, other), plan, 0.05), limit=limit)
    (finding,) = found.findings
    assert finding.sign.name == "label_prefers_rejected"
    assert [(e.row, e.excerpt) for e in finding.rows] == [(6, "better_response_id: 1")]


def test_numbers_beyond_floats_are_compared_and_shown() -> None:
    huge = 10**400
    sides = sides_of(NUMBERED)
    row: dict[str, Any] = {"score_chosen": 2.5, "score_rejected": huge, "better_response_id": huge}
    ((sign, said),) = column_signs(row, _PAIR, sides)
    assert (sign.name, said) == ("chosen_scored_lower", f"score_chosen 2.5, score_rejected {huge}")
