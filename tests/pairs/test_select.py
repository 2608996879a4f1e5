"""Which prompts are asked: every filter, and samples that are seeded and keep their strata."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tandem.data.ledger import Ledger
from tandem.data.records import Origin, Turn
from tandem.data.text.contamination import Other
from tandem.pairs.filters import similarity, words_of
from tandem.pairs.prompts import Prompt, read_prompts, select_prompts
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import SelectSettings


def prompt(question: str, answer: str = "yes", *, row: int = 1, source: int = 0) -> Prompt:
    return Prompt((Turn("user", question),), answer, (), Origin("f", row), source)


def numbered(count: int, **options: Any) -> list[Prompt]:
    return [prompt(f"question {i}", row=i, **options) for i in range(count)]


def rows(prompts: list[Prompt]) -> list[int]:
    return [one.origin.row for one in prompts]


def test_without_wishes_all_are_asked_in_order() -> None:
    prompts = numbered(10)
    assert select_prompts(prompts, SelectSettings(), seed=1) == (prompts, {})
    assert select_prompts(prompts, SelectSettings(count=99), seed=1) == (prompts, {})


def test_a_sample_follows_the_seed_and_keeps_the_order() -> None:
    prompts = numbered(100)
    chosen, left_out = select_prompts(prompts, SelectSettings(count=30), seed=1)
    assert len(set(rows(chosen))) == 30
    assert rows(chosen) == sorted(rows(chosen))
    assert left_out == {"not in the sample": 70}
    assert chosen == select_prompts(iter(prompts), SelectSettings(count=30), seed=1)[0]
    assert chosen != select_prompts(prompts, SelectSettings(count=30), seed=2)[0]


def test_every_record_is_as_likely_as_any_other() -> None:
    prompts = numbered(20)
    found: Counter[int] = Counter()
    for seed in range(2000):
        found.update(rows(select_prompts(prompts, SelectSettings(count=5), seed=seed)[0]))
    assert sum(found.values()) == 10_000
    # 500 expected, with a standard deviation of 19.4
    assert all(abs(found[i] - 500) < 90 for i in range(20))


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ("proportional", 10, {0: 6, 1: 3, 2: 1}),
        ("proportional", 7, {0: 4, 1: 2, 2: 1}),
        ("equal", 30, {0: 10, 1: 10, 2: 10}),
        ("equal", 50, {0: 20, 1: 20, 2: 10}),
        ("equal", 31, {0: 11, 1: 10, 2: 10}),
        ("equal", 2, {0: 1, 1: 1}),
        ("equal", 999, {0: 60, 1: 30, 2: 10}),
        ("proportional", 999, {0: 60, 1: 30, 2: 10}),
    ],
)
def test_strata_by_source(shares: Any, count: int, expected: dict[int, int]) -> None:
    prompts = [*numbered(60), *numbered(30, source=1), *numbered(10, source=2)]
    selection = SelectSettings(count=count, stratify="source", shares=shares)
    chosen, _ = select_prompts(prompts, selection, seed=3)
    assert Counter(one.source for one in chosen) == expected


def test_strata_by_length() -> None:
    prompts = [prompt("x" * length, row=i) for i, length in enumerate([3] * 80 + [100] * 20)]
    selection = SelectSettings(count=10, stratify="length")
    lengths = Counter(len(one.question) for one in select_prompts(prompts, selection, seed=0)[0])
    assert lengths == {3: 8, 100: 2}


@pytest.mark.parametrize(
    ("wish", "kept", "reason"),
    [
        ({"min_prompt_characters": 6}, [1, 2, 3, 4], "prompt too short"),
        ({"max_prompt_characters": 40}, [0, 1, 2, 4], "prompt too long"),
        ({"min_answer_characters": 4}, [1, 2, 3, 4], "answer too short"),
        ({"max_answer_characters": 25}, [0, 1, 3, 4], "answer too long"),
        ({"matches": r"\?$"}, [1, 2, 3, 4], "prompt does not match"),
        ({"excludes": r"(?i)HOW"}, [0, 1, 3, 4], "prompt is excluded"),
        ({"distinct": True}, [0, 1, 2, 3], "prompt occurred before"),
        ({"language": "en"}, [0, 1, 2, 4], "prompt in another language"),
    ],
)
def test_every_filter(wish: dict[str, Any], kept: list[int], reason: str) -> None:
    prompts = [
        prompt("Hello", "hi", row=0),
        prompt("What is two and two?", "It is four.", row=1),
        prompt("How do I get to the town hall?", "You go to the end of the street.", row=2),
        prompt("Was ist das und warum ist es nicht auf dem Tisch?", "Ein Hund.", row=3),
        prompt("What is two and two? ", "The other four.", row=4),
    ]
    if "matches" in wish:
        prompts[4] = prompt("What is that?", row=4)
    chosen, left_out = select_prompts(prompts, SelectSettings(**wish), seed=0)
    assert rows(chosen) == kept
    assert left_out == {reason: 1}


def test_similarity_is_the_share_of_common_neighbours() -> None:
    assert similarity("The cat sat.", "the CAT, sat") == 1
    assert similarity("a b c d", "a b x d") == pytest.approx(2 * 1 / 6)
    assert similarity("a b a b", "a b") == pytest.approx(2 * 1 / 4)
    assert similarity("Paris", "It is Paris") == pytest.approx(2 * 1 / 4)
    assert similarity("one two", "three four") == 0
    assert similarity("!!", "??") == 0
    assert similarity("!! ??", "!!  ??") == 1
    assert words_of("Don't, 3.5 km; 東京へ") == ["don", "t", "3", "5", "km", "東", "京", "へ"]


def test_prompts_that_share_thirteen_words_with_an_evaluation_set_are_left_out() -> None:
    words = [f"w{i}" for i in range(40)]
    known = Other("set", form=None)
    known.add([" ".join(words[:20])], Origin("set", 1))
    prompts = [
        prompt(" ".join(words[2:30]), row=0),
        prompt("fine", " ".join(words[5:18]), row=1),
        prompt("fine", row=2),
    ]
    chosen, left_out = select_prompts(prompts, SelectSettings(), seed=0, evaluated=known)
    assert rows(chosen) == [2]
    assert left_out == {"in an evaluation set": 2}


def test_what_cannot_be_a_prompt_is_in_the_ledger(tmp_path: Path) -> None:
    def talk(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return json.dumps({"messages": messages}) + "\n"

    path = tmp_path / "talks.jsonl"
    path.write_text(
        talk(("system", "Be brief."), ("user", "hi"), ("assistant", "ho"), ("user", "and"),
             ("assistant", "on"))
        + talk(("user", "hi"), ("assistant", "ho"))
    )  # fmt: skip
    ledger = Ledger()
    found = list(
        read_prompts([DataSource(path=str(path)), DataSource(path=str(path))], "different", ledger)
    )
    assert [(one.system, one.question, one.answer, one.source) for one in found] == [
        ("Be brief.", "hi", "ho", 0),
        ("", "hi", "ho", 0),
        ("Be brief.", "hi", "ho", 1),
        ("", "hi", "ho", 1),
    ]
    assert ledger.entries == []
