"""True facts, written for the demo: tables, and sentence patterns over them."""

from __future__ import annotations

from functools import cache

from tandem.demo.facts import culture, geography, nature, science
from tandem.demo.facts.fact import Fact, Relation

RELATIONS: tuple[Relation, ...] = (
    *geography.RELATIONS,
    *science.RELATIONS,
    *science.CALENDAR,
    *nature.RELATIONS,
    *culture.WORDS,
    *science.NUMBERS,
    *culture.RELATIONS,
)


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact of the demo, in the order of the tables."""
    return tuple(fact for relation in RELATIONS for fact in relation.facts())


__all__ = ["RELATIONS", "Fact", "Relation", "all_facts"]
