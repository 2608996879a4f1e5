"""How rows are read: known formats, and verdicts on rows that cannot be used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.data.formats.conversations import read_question
from tandem.data.formats.format import InvalidRecord
from tandem.data.formats.known_formats import (
    FORMATS,
    describe_formats,
    detect,
    format_called,
    format_with,
    variant,
)
from tandem.data.formats.turns import UNKNOWN_ROLE
from tandem.data.records import Conversation, Origin, Preference, Turn
from tandem.errors import UserError

ORIGIN = Origin("made.jsonl", 7)


def read(fields: dict[str, Any]) -> Conversation | Preference:
    known = detect(fields)
    assert known is not None
    (record,) = known.read(fields, ORIGIN)
    assert not isinstance(record, InvalidRecord)
    return record


def sharegpt(*turns: tuple[Any, ...]) -> dict[str, Any]:
    keys = ("from", "value", "weight")
    return {"conversations": [dict(zip(keys, turn, strict=False)) for turn in turns]}


def test_sharegpt_roles_weights_and_unknown_columns() -> None:
    row = sharegpt(
        ("system", "S", None),
        ("human", "Q1", 0.0),
        ("gpt", "A1", 0),
        ("human", "Q2", 1.0),
        ("gpt", "A2", 1.0),
    )
    assert read({**row, "source": "x", "accepted": ["y"]}) == Conversation(
        (
            Turn("system", "S"),
            Turn("user", "Q1"),
            Turn("assistant", "A1", trained=False),
            Turn("user", "Q2"),
            Turn("assistant", "A2"),
        ),
        ORIGIN,
    )


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(False, True), (0, 1), (0.0, 1.0), (False, None)])
def test_an_answer_says_whether_it_is_trained_under_several_keys(
    key: str, no: object, yes: object
) -> None:
    turns = [said("user", "Q"), said("assistant", "A")] * 2
    row = {"messages": [*turns[:1], {**turns[1], key: no}, turns[2], {**turns[3], key: yes}]}
    conversation = read(row)
    assert isinstance(conversation, Conversation)
    assert [turn.trained for turn in conversation.turns if turn.role == "assistant"] == [
        False,
        True,
    ]


def test_messages_with_text_parts_and_turns_after_the_last_trained_answer() -> None:
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": " A\n"},
            {"role": "user", "content": "never answered"},
        ]
    }
    assert read(row) == Conversation((Turn("user", "Q"), Turn("assistant", " A\n")), ORIGIN)


@pytest.mark.parametrize("system", ["", None])
def test_orca_pairs_without_a_system_text(system: str | None) -> None:
    row = {"system": system, "question": "Q", "chosen": "C", "rejected": "R"}
    assert read(row) == Preference((Turn("user", "Q"),), ("C", "R"), ORIGIN)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM_AND_USER = (Turn("system", "S"), Turn("user", "Q"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "turns"),
    [
        ("Q", "C", "R", SYSTEM_AND_USER[1:]),
        ([said("system", "S"), said("user", "Q")], "C", "R", SYSTEM_AND_USER),
        (
            [said("system", "S"), said("user", "Q")],
            [said("assistant", "C")],
            [said("assistant", "R")],
            SYSTEM_AND_USER,
        ),
        # UltraFeedback: a text as prompt, and answers that repeat it as messages.
        (
            "Q",
            [said("user", "Q"), said("assistant", "C")],
            [said("user", "Q"), said("assistant", "R")],
            SYSTEM_AND_USER[1:],
        ),
        (
            "Q",
            [said("system", "S"), said("user", "Q"), said("assistant", "C")],
            [said("system", "S"), said("user", "Q"), said("assistant", "R")],
            SYSTEM_AND_USER,
        ),
    ],
)
def test_explicit_preference(
    prompt: object, chosen: object, rejected: object, turns: tuple[Turn, ...]
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "messages": []}
    assert read(row) == Preference(turns, ("C", "R"), ORIGIN)


Q_AND_A = (Turn("user", "Q"), Turn("assistant", "A"))
TALK = [said("user", "Q"), said("assistant", "A")]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "Q", "input": "", "output": "A"}, Q_AND_A),
        ({"instruction": "Q", "output": "A", "text": "all of it"}, Q_AND_A),
        (
            {"system": "S", "instruction": "Q", "input": "given", "output": "A"},
            (Turn("system", "S"), Turn("user", "Q\n\ngiven"), Turn("assistant", "A")),
        ),
        (
            {"instruction": "More?", "output": "B", "history": [["Q", "A"]]},
            (*Q_AND_A, Turn("user", "More?"), Turn("assistant", "B")),
        ),
        ({"prompt": "Q", "completion": "A"}, Q_AND_A),
        ({"prompt": "Q", "completion": "A", "label": True}, Q_AND_A),
        ({"prompt": "Q", "completion": "A", "label": "True"}, Q_AND_A),
        (
            {**sharegpt(("human", "Q"), ("gpt", "A")), "system": "S"},
            (Turn("system", "S"), *Q_AND_A),
        ),
        ({**sharegpt(("human", "Q"), ("gpt", "A")), "system": ""}, Q_AND_A),
        (
            {"messages": [said("system", "S"), *TALK], "system": "S"},
            (Turn("system", "S"), *Q_AND_A),
        ),
        ({"prompt": [said("user", "Q")], "completion": [said("assistant", "A")]}, Q_AND_A),
        ({"instruction": "", "input": "Q", "output": "A"}, Q_AND_A),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "completion": " A"}, Q_AND_A),
        # No transcript: it ends with no answer to come.
        ({"prompt": "Q", "response": " A"}, (Q_AND_A[0], Turn("assistant", " A"))),
        (
            {"prompt": [said("system", "S"), said("user", "Q")], "completion": "A"},
            (Turn("system", "S"), *Q_AND_A),
        ),
    ],
)
def test_one_question_and_its_answer(row: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    assert read(row) == Conversation(turns, ORIGIN)


HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: More?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {
                "chosen": [said("user", "Q"), said("assistant", "C")],
                "rejected": [said("user", "Q"), said("assistant", "R")],
                "score_chosen": 8.0,
            },
            (Turn("user", "Q"),),
        ),
        ({"chosen": f"{HH} C", "rejected": f"{HH} R"}, (*Q_AND_A, Turn("user", "More?"))),
        (
            {"chosen": "Human: a\nb\n\nAssistant: C", "rejected": "Human: a\nb\n\nAssistant: R"},
            (Turn("user", "a\nb"),),
        ),
    ],
)
def test_preference_whose_prompt_is_in_both(row: dict[str, Any], prompt: tuple[Turn, ...]) -> None:
    assert read(row) == Preference(prompt, ("C", "R"), ORIGIN)


@pytest.mark.parametrize(
    "row",
    [
        # As LLaMA-Factory keeps pairs.
        {
            **sharegpt(("human", "Q"), ("gpt", "A"), ("human", "More?")),
            "chosen": {"from": "gpt", "value": "C"},
            "rejected": {"from": "gpt", "value": "R"},
        },
        {
            "instruction": "More?",
            "input": "",
            "history": [["Q", "A"]],
            "chosen": "C",
            "rejected": "R",
        },
        {"prompt": [*TALK, said("user", "More?")], "chosen": "C", "rejected": "R"},
        # As edited sets of HH-RLHF keep pairs.
        {"prompt": HH, "chosen": " C", "rejected": " R"},
        # The prompt is the first question of both.
        {
            "prompt": "Q",
            "chosen": [*TALK, said("user", "More?"), said("assistant", "C")],
            "rejected": [*TALK, said("user", "More?"), said("assistant", "R")],
        },
    ],
)
def test_pairs_behind_a_conversation(row: dict[str, Any]) -> None:
    assert read(row) == Preference((*Q_AND_A, Turn("user", "More?")), ("C", "R"), ORIGIN)


def answers(*scores: object, key: str = "overall_score") -> dict[str, Any]:
    """An UltraFeedback row whose first answer is A1."""
    completions = [{"response": f"A{i}", key: score} for i, score in enumerate(scores, start=1)]
    return {"source": "made", "instruction": "Q", "completions": completions}


def rated(*ratings: str) -> dict[str, Any]:
    """An answer as UltraFeedback's annotations rate it, a number for each aspect."""
    aspects = zip("abcd", ratings, strict=False)
    return {name: {"Rating": rating, "Rationale": "so"} for name, rating in aspects}


@pytest.mark.parametrize(
    ("row", "choice", "pairs"),
    [
        (answers(2.0, 9.0, 5.0), None, ["A2 A1"]),
        (answers(2.0, 9.0, 5.0), "best_vs_worst", ["A2 A1"]),
        (answers(2.0, 9.0, 5.0), "best_vs_rest", ["A2 A1", "A2 A3"]),
        (answers("3", "9.5"), None, ["A2 A1"]),
        (answers(2, 9, key="fine-grained_score"), None, ["A2 A1"]),
        (answers(rated("1", "N/A", "5"), rated("4"), key="annotations"), None, ["A2 A1"]),
        # Of equal ones the first is best, and the last worst.
        (answers(9, 9, 1, 1), None, ["A1 A4"]),
        (
            answers(9, 9, 1),
            "best_vs_rest",
            ["both answers have the same score: answers 1 and 2: 9", "A1 A3"],
        ),
        (answers(4, 4), None, ["both answers have the same score: answers 1 and 2: 4"]),
        (
            answers(None, 9, "N/A", 5),
            "best_vs_rest",
            [
                "an answer without a score: answer 1",
                "an answer without a score: answer 3",
                "A2 A4",
            ],
        ),
        # All of a row by one measure, the one that most answers have.
        (
            {
                "instruction": "Q",
                "completions": [
                    {"response": "A1", "overall_score": 9, "annotations": rated("1")},
                    {"response": "A2", "annotations": rated("4")},
                ],
            },
            None,
            ["A2 A1"],
        ),
    ],
)
def test_scored_answers(row: dict[str, Any], choice: str | None, pairs: list[str]) -> None:
    known = detect(row)
    assert known is not None
    found = variant(known, "preference pairs", choice).read(row, ORIGIN)
    described = []
    for one in found:
        if isinstance(one, InvalidRecord):
            described.append(f"{one.reason}: {one.detail}")
        else:
            assert isinstance(one, Preference)
            assert (one.prompt, one.origin) == ((Turn("user", "Q"),), ORIGIN)
            described.append(f"{one.chosen} {one.rejected}")
    assert described == pairs


def scored_twice(*scores: tuple[float, float]) -> dict[str, Any]:
    completions = [
        {"response": f"A{i}", "overall_score": first, "fine-grained_score": second}
        for i, (first, second) in enumerate(scores, start=1)
    ]
    return {"instruction": "Q", "completions": completions}


def test_measures_may_differ_as_long_as_the_best_is_not_the_worst() -> None:
    for scores in ([(9, 4), (8, 4.5), (5, 2)], [(9, 3), (5, 3)], [(9, 3)] + [(1, 3)] * 2):
        pair = read(scored_twice(*scores))
        assert isinstance(pair, Preference)
        assert pair.chosen == "A1"


def test_an_empty_or_equal_scored_answer_costs_its_own_pair_alone() -> None:
    row = answers(9, 5, 3, 1)
    row["completions"][1]["response"] = ""
    row["completions"][2]["response"] = "A1"
    known = variant(format_called("UltraFeedback"), "preference pairs", "best_vs_rest")
    empty, same, pair = known.read(row, ORIGIN)
    assert str(empty) == "empty answer"
    assert str(same) == "identical answers"
    assert isinstance(pair, Preference)
    assert (pair.chosen, pair.rejected) == ("A1", "A4")


def test_what_users_are_told_of_formats_can_be_said_in_recipes() -> None:
    assert len({known.id for known in FORMATS}) == len(FORMATS)
    for known in FORMATS:
        assert format_with(known.id) is known
        chosen = variant(format_called(known.name), known.kind, known.completions)
        assert replace(chosen, stated=False) == known
        assert known.name in describe_formats(known.kind)
    assert describe_formats("preference pairs").count("UltraFeedback (") == 1


def test_formats_have_names_for_recipes() -> None:
    assert format_called("ultrafeedback").name == "UltraFeedback"
    assert format_called("prompt_and_completion").name == "prompt and completion"
    assert format_called("orca-dpo-pairs").name == "orca_dpo_pairs"
    with pytest.raises(UserError, match=r"no format 'sharegtp'. Did you mean 'ShareGPT'\?"):
        format_called("sharegtp")
    with pytest.raises(UserError, match="Known formats: tokens, token pairs, orca_dpo_pairs"):
        format_called("?")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Q", "output": " "}, "empty answer"),
        (
            {"instruction": "Q", "output": "A", "history": [["Q"]]},
            "`history` is not a list of question and answer",
        ),
        ({**sharegpt(("human", "Q"), ("gpt", "A")), "system": 5}, "`system` is not a text"),
        (
            {"messages": [said("system", "S"), *TALK], "system": "T"},
            "more than one system turn",
        ),
        (
            sharegpt(("system", "S"), ("system", "T"), ("human", "Q"), ("gpt", "A")),
            "more than one system turn",
        ),
        ({"prompt": "Q", "completion": "A", "label": False}, "the answer is labelled false"),
        ({"prompt": "Q", "completion": "A", "label": None}, "`label` is neither true nor false"),
        ({"prompt": "Q", "completion": "A", "label": 2}, "`label` is neither true nor false"),
        ({"instruction": "Q", "completions": []}, "`completions` is not a list of answers"),
        (
            {"instruction": "Q", "completions": ["A"]},
            "`completions` holds an answer that is not an object",
        ),
        (answers(5, None), "fewer than two answers have a score"),
        (answers(float("nan"), float("inf"), 3), "fewer than two answers have a score"),
        (answers(True, 3), "fewer than two answers have a score"),
        ({"instruction": None, "output": "A"}, "`instruction` is null or missing"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "`input` is not a text"),
        ({"prompt": "Q", "completion": ""}, "empty answer"),
        ({"prompt": [said("assistant", "Q")], "completion": "A"}, "roles out of order"),
        (
            {"chosen": "C", "rejected": "R"},
            "`chosen` is neither messages nor a transcript (Human: ... Assistant: ...)",
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: C", "rejected": "\n\nHuman: P\n\nAssistant: R"},
            "chosen and rejected follow different prompts",
        ),
        (
            {"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q"},
            "`chosen` does not end with an assistant turn",
        ),
        (
            {"chosen": [said("assistant", "C")], "rejected": [said("assistant", "R")]},
            "`chosen` holds an answer without a question",
        ),
        ({"chosen": f"{HH} C", "rejected": HH}, "empty answer"),
        (sharegpt(("human", "Q")), "no assistant turn"),
        (sharegpt(("system", "")), "no assistant turn"),
        (sharegpt(("human", "Q"), ("gpt", " \n")), "empty answer"),
        (sharegpt(("human", ""), ("gpt", "A")), "empty user turn"),
        (sharegpt(("human", None), ("gpt", "A")), "a turn's `value` is null or missing"),
        (sharegpt(("human", 5), ("gpt", "A")), "a turn's `value` is not a text"),
        (sharegpt(("gpt", "A"), ("human", "Q")), "roles out of order"),
        (sharegpt(("human", "Q"), ("human", "Q"), ("gpt", "A")), "roles out of order"),
        (sharegpt(("human", "Q"), ("system", "S"), ("gpt", "A")), "roles out of order"),
        (sharegpt(("moderator", "Q"), ("gpt", "A")), UNKNOWN_ROLE),
        (sharegpt(("tool", "Q"), ("gpt", "A")), "roles out of order"),
        (sharegpt(("human", "Q"), ("tool", "R"), ("gpt", "A")), "roles out of order"),
        (
            sharegpt(("human", "Q"), ("function_call", "no JSON")),
            "`tool_calls` is a text that is no JSON",
        ),
        (
            sharegpt(("human", "Q"), ("function_call", '{"arguments": {}}')),
            "a tool call without a name",
        ),
        (
            sharegpt(("human", "Q"), ("gpt", "A", 0.5)),
            "an answer's weight is neither 0 nor 1",
        ),
        (sharegpt(("human", "\ud800"), ("gpt", "A")), "a text holds half of a surrogate pair"),
        ({"conversations": "text"}, "`conversations` is a text, not a list of turns"),
        ({"conversations": None}, "`conversations` is not a list of turns"),
        ({"conversations": []}, "`conversations` is not a list of turns"),
        ({"messages": ["Q", "A"]}, "`messages` holds texts that do not say who speaks"),
        ({"messages": [5]}, "`messages` holds a turn that is not an object"),
        (
            {"messages": [{**said("user", ""), "content": [{"type": "image"}]}, TALK[1]]},
            "a turn's `content` has a part that is no text",
        ),
        (
            {"messages": [said("user", "Q"), {**TALK[1], "train": 0.5}]},
            "an answer's train is neither 0 nor 1",
        ),
        (
            {"messages": [said("user", "Q"), {**TALK[1], "train": True, "weight": 0}]},
            "an answer's `weight` and `train` differ",
        ),
        (
            {"messages": [said("user", "Q"), {**TALK[1], "train_detail": [{"begin_offset": 0}]}]},
            "an answer's `train_detail` is about parts of it; it is trained or not",
        ),
        (scored_twice((10, 1.2), (8.5, 5)), "its scores contradict each other"),
        (scored_twice((10, 1.2), (9, 2), (8.5, 5)), "its scores contradict each other"),
        ({"instruction": "", "output": "A"}, "empty `instruction`"),
        ({"prompt": "\n\nHuman: \n\nAssistant:", "completion": "A"}, "empty user turn"),
        ({"question": "Q", "chosen": "same ", "rejected": "same"}, "identical answers"),
        ({"question": "Q", "chosen": "C", "rejected": ""}, "empty answer"),
        ({"question": "Q", "chosen": None, "rejected": "R"}, "`chosen` is null or missing"),
        ({"question": None, "chosen": "C", "rejected": "R"}, "`question` is null or missing"),
        ({"question": "Q", "chosen": 3, "rejected": "R"}, "`chosen` is not a text"),
        ({"prompt": [], "chosen": "C", "rejected": "R"}, "`prompt` is not a list of turns"),
        (
            {
                "prompt": "Q",
                "chosen": [said("user", "other"), said("assistant", "C")],
                "rejected": "R",
            },
            "`chosen` repeats another prompt than `prompt`",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        read(row)
    assert caught.value.reason == reason


def test_rows_of_no_known_format_are_not_guessed_at() -> None:
    assert detect({"texts": "hello"}) is None
    assert detect({"instruction": "Q", "answer": "A"}) is None


def test_questions() -> None:
    question = read_question({"question": "Q", "answer": "A b.", "completion": "A is"}, ORIGIN)
    assert (question.turns, question.accepted, question.completion) == (
        (Turn("user", "Q"),),
        ("A b.",),
        "A is",
    )
    full = {"system": "S", "question": "Q", "answer": "A", "accepted": ["a", "A"]}
    assert read_question(full, ORIGIN).turns == SYSTEM_AND_USER
    assert read_question(full, ORIGIN).accepted == ("a", "A")
    with pytest.raises(InvalidRecord, match="`answer` is null"):
        read_question({"question": "Q"}, ORIGIN)
    with pytest.raises(InvalidRecord, match="`accepted` is not a list"):
        read_question({**full, "accepted": "a"}, ORIGIN)
