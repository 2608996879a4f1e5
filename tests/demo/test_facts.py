"""The tables: unique, well formed, and their answers checkable."""

from __future__ import annotations

from collections import Counter

import pytest

from tandem.data.text.text_traits import contains_accepted
from tandem.demo.facts import RELATIONS, Fact, all_facts, in_words

FACTS = all_facts()


def test_there_are_enough_facts_and_each_is_told_once() -> None:
    assert len(FACTS) >= 380
    assert len({fact.key for fact in FACTS}) == len(FACTS)
    assert len({fact.answer for fact in FACTS}) == len(FACTS)
    assert len({relation.name for relation in RELATIONS}) == len(RELATIONS)


def test_a_question_asks_for_one_fact_only() -> None:
    counts = Counter(question for fact in FACTS for question in fact.questions)
    assert [question for question, count in counts.items() if count > 1] == []


def test_every_fact_is_well_formed() -> None:
    assert [fact.key for fact in FACTS if not _well_formed(fact)] == []


def _well_formed(fact: Fact) -> bool:
    texts = (*fact.questions, *fact.statements)
    return (
        len(fact.questions) == 3
        and all(question.endswith("?") for question in fact.questions)
        and fact.answer.endswith(".")
        and fact.answer.startswith(fact.completion)
        and fact.answer in fact.statements
        and contains_accepted(fact.answer, fact.accepted)
        and all("{" not in text and "  " not in text and text[0].isupper() for text in texts)
    )


def test_repeating_the_question_is_not_knowing() -> None:
    told = [
        fact.key
        for fact in FACTS
        if any(
            contains_accepted(text, fact.accepted) for text in (*fact.questions, fact.completion)
        )
    ]
    assert told == []


def test_rules_make_the_rows_they_should() -> None:
    answers = {fact.answer for fact in FACTS}
    assert "Seven plus eight is fifteen." in answers
    assert "Six times seven is forty-two." in answers
    assert "The month after December is January." in answers
    assert "The day after Sunday is Monday." in answers
    assert "With its voice an owl hoots." in answers
    assert [in_words(n) for n in (0, 13, 20, 81)] == ["zero", "thirteen", "twenty", "eighty-one"]
    with pytest.raises(ValueError, match="outside"):
        in_words(100)
