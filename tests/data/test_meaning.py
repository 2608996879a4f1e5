"""What a recipe says about rows: it applies, or an error says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.data.encoded.dataset_store import encoding_key
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs, read_questions
from tandem.data.records import Turn
from tandem.data.resolve_sources import check_format, data_identity
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

PAIR = {"ask": "Q", "good": "C", "bad": "R"}
NAMES = {"question": "ask", "chosen": "good", "rejected": "bad"}


def source(path: Path, rows: list[dict[str, Any]], **said: Any) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path), **said)
    check_format(source)
    return source


def pairs(path: Path, rows: list[dict[str, Any]], **said: Any) -> list[tuple[Any, ...]]:
    found = read_pairs([source(path / "p.jsonl", rows, **said)], Ledger())
    return [(one.prompt[-1].content, one.chosen, one.rejected) for one in found]


def test_names_make_a_known_format(tmp_path: Path) -> None:
    assert pairs(tmp_path, [PAIR, PAIR], fields=NAMES) == [("Q", "C", "R")] * 2


def test_names_reach_into_objects_and_may_hold_dots(tmp_path: Path) -> None:
    row = {"data": {"ask": {"text": "Q"}}, "good.er": "C", "bad": "R"}
    names = {"question": "data.ask.text", "chosen": "good.er", "rejected": "bad"}
    assert pairs(tmp_path, [row], fields=names) == [("Q", "C", "R")]


def test_names_can_be_exchanged(tmp_path: Path) -> None:
    row = {"question": "Q", "chosen": "worse", "rejected": "better"}
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert pairs(tmp_path, [row], fields=swapped) == [("Q", "better", "worse")]


def test_a_stated_format_is_taken_where_the_keys_say_another(tmp_path: Path) -> None:
    row = {"question": "no", "prompt": "Q", "chosen": "C", "rejected": "R"}
    assert pairs(tmp_path, [row]) == [("no", "C", "R")]
    assert pairs(tmp_path, [row], format="explicit preference") == [("Q", "C", "R")]


def test_roles_and_the_names_of_turns(tmp_path: Path) -> None:
    row = {"log": [{"who": "bot", "text": "S"}, {"who": "caller", "text": "Q"},
                   {"who": "agent", "text": "A"}]}  # fmt: skip
    spec = source(
        tmp_path / "c.jsonl",
        [row],
        fields={"messages": "log", "role": "who", "content": "text"},
        roles={"bot": "system", "caller": "user", "agent": "assistant"},
    )
    (found,) = read_conversations([spec], Ledger())
    assert found.turns == (Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"))


def talk(
    path: Path, turns: list[dict[str, Any]], column: str = "messages", **fields: str
) -> list[Turn]:
    spec = source(path / "c.jsonl", [{"log": turns}], fields={column: "log"} | fields)
    return [turn for one in read_conversations([spec], Ledger()) for turn in one.turns]


def test_a_renamed_key_of_a_turn_is_only_what_the_recipe_says(tmp_path: Path) -> None:
    asked, said = [Turn("user", "Q")], [Turn("assistant", "A")]
    names = {"role": "who", "content": "said"}
    for column, *keys in (("messages", "role", "content"), ("conversations", "from", "value")):
        other = dict(zip(keys, ("assistant", "other"), strict=True))
        turns = [{"who": "user", "said": "Q", **other}, {**other, "who": "assistant", "said": "A"}]
        assert talk(tmp_path, turns, column, **names) == asked + said
    # Without the name there is nothing, as in a row.
    late = [*turns, {"role": "user", "content": "B"}, {"role": "assistant", "content": "B"}]
    assert talk(tmp_path, late, **names) == []
    swapped = [{"role": "Q", "content": "user"}, {"role": "A", "content": "assistant"}]
    assert talk(tmp_path, swapped, role="content", content="role") == asked + said


def test_tools_have_names_in_every_format(tmp_path: Path) -> None:
    rows = [{"question": "Q", "chosen": "C", "rejected": "R", "functions": '[{"name": "look"}]'}]
    spec = source(tmp_path / "p.jsonl", rows, fields={"tools": "functions"})
    (found,) = read_pairs([spec], Ledger())
    assert found.tools == '[{"name": "look"}]'


def test_names_reach_into_turns(tmp_path: Path) -> None:
    turns = [{"by": {"role": "user"}, "content": "Q"}, {"by": {"role": "gpt"}, "content": "A"}]
    found = talk(tmp_path, turns, role="by.role")
    assert found == [Turn("user", "Q"), Turn("assistant", "A")]


def test_an_answers_weight_has_names_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "mask": 0}]
    assert [turn.trained for turn in talk(tmp_path, turns, weight="mask")] == [True, False]


def test_questions_have_names_too(tmp_path: Path) -> None:
    spec = source(tmp_path / "q.jsonl", [{"ask": "Q", "key": "A"}], fields={"question": "ask",
                  "answer": "key"})  # fmt: skip
    (found,) = read_questions([spec])
    assert (found.turns, found.answer) == ((Turn("user", "Q"),), "A")
    with pytest.raises(UserError, match="`format` has no effect on questions"):
        read_questions([source(tmp_path / "q.jsonl", [PAIR], format="messages")])


TALK = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


@pytest.mark.parametrize(
    ("row", "said", "message"),
    [
        (
            PAIR,
            {"fields": NAMES | {"chosen": "godo"}},
            "names 'godo', which no row has. Did you mean 'good'",
        ),
        (PAIR, {"fields": NAMES | {"chosen": "GOOD"}}, "Did you mean 'good'"),
        (
            {"question": "Q", "chosen": "C", "rejected": "R", "messages": [{"role": "bot"}]},
            {"roles": {"bot": "assistant"}},
            "has no turns",
        ),
        # What is left would be another format.
        (
            {"ask": "Q", "chosen": "C", "rejected": "R"},
            {"fields": {"question": "asq"}},
            "names 'asq', which no row has. Did you mean 'ask'",
        ),
        (
            PAIR,
            {"fields": NAMES | {"system": "instructions"}},
            "`fields` names 'instructions', which no row has. The rows have: ask, good, bad",
        ),
        (
            PAIR | {"system_prompt": "S"},
            {"fields": NAMES | {"system": "sistem_prompt"}},
            "Did you mean 'system_prompt'",
        ),
        (PAIR, {"fields": NAMES | {"sistem": "ask"}}, "no such key. Did you mean 'system'"),
        (
            {"question": "Q", "chosen": "C", "rejected": "R"},
            {"fields": {"chosen": "chosen"}},
            "changes nothing",
        ),
        (
            {"question": "Q", "chosen": "C", "rejected": "R"},
            {"completions": "best_vs_worst"},
            "chooses between scored answers",
        ),
        (PAIR, {"format": "orca_dpo_pairs"}, "states orca_dpo_pairs"),
        (PAIR, {"format": "orca_dpo_pear"}, "Did you mean 'orca_dpo_pairs'"),
        (TALK, {"format": "messages"}, "holds conversations"),
    ],
)
def test_what_cannot_apply_is_an_error(
    tmp_path: Path, row: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pairs(tmp_path, [row], **said)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"bot": "assistant"}, "nobody speaks under that name"),
        ({"user": "user"}, "means that anyway"),
    ],
)
def test_roles_without_effect_are_errors(
    tmp_path: Path, roles: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_conversations([source(tmp_path / "c.jsonl", [TALK], roles=roles)], Ledger()))


def test_a_table_of_questions_under_its_own_names(shared_data: Path) -> None:
    path = shared_data / "evaluation" / "truthfulqa.csv"
    names = {"question": "Question", "answer": "Best Answer"}
    found = read_questions([DataSource(path=str(path), fields=names)])
    assert len(found) == 817
    assert found[0].turns[0].content.endswith("?")


def test_a_name_that_only_a_late_row_has_is_found(tmp_path: Path) -> None:
    rows = [PAIR] * 600 + [PAIR | {"sys": "S"}]
    assert len(pairs(tmp_path, rows, fields=NAMES | {"system": "sys"})) == 601


def test_what_is_said_is_part_of_what_the_data_is(tmp_path: Path) -> None:
    parts: Any = SimpleNamespace(identity="a tokenizer", all_rows=None)
    plan = EncodingOptions("preference pairs", Limits(64, None), "stop")
    said: list[dict[str, Any]] = [
        {},
        {"fields": NAMES},
        {"fields": NAMES, "format": "orca_dpo_pairs"},
        {"roles": {"bot": "assistant"}},
        {"completions": "best_vs_rest"},
    ]
    specs = [source(tmp_path / "p.jsonl", [PAIR], **one) for one in said]
    assert len({encoding_key([spec], parts, plan) for spec in specs}) == len(said)
    assert len({json.dumps(data_identity([spec])) for spec in specs}) == len(said)
