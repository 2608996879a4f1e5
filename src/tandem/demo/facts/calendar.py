"""Months and days of the week: facts that follow from their order."""

from __future__ import annotations

from tandem.demo.facts.fact import Relation

_MONTHS = (
    ("January", "31"),
    ("February", "28"),
    ("March", "31"),
    ("April", "30"),
    ("May", "31"),
    ("June", "30"),
    ("July", "31"),
    ("August", "31"),
    ("September", "30"),
    ("October", "31"),
    ("November", "30"),
    ("December", "31"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _successors(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(names, names[1:] + names[:1], strict=True))


_MONTH_NAMES = tuple(name for name, _ in _MONTHS)

MONTH_LENGTHS = Relation(
    name="month-length",
    # February is left out: its length is not one number.
    rows=tuple(row for row in _MONTHS if row[0] != "February"),
    questions=(
        "How many days does {s} have?",
        "How long is the month of {s}?",
        "How many days are there in {s}?",
    ),
    answer="The number of days in {s} is {v}.",
    statements=("The month of {s} has {v} days.", "{s} is {v} days long."),
)

NEXT_MONTH = Relation(
    name="next-month",
    rows=_successors(_MONTH_NAMES),
    questions=(
        "Which month comes after {s}?",
        "What month follows {s}?",
        "Which month is next when {s} is over?",
    ),
    answer="The month after {s} is {v}.",
    statements=("{s} is followed by {v}.", "When {s} is over, {v} begins."),
)

NEXT_DAY = Relation(
    name="next-day",
    rows=_successors(_DAYS),
    questions=(
        "Which day comes after {s}?",
        "What day follows {s}?",
        "If today is {s}, what day is tomorrow?",
    ),
    answer="The day after {s} is {v}.",
    statements=("{s} is followed by {v}.", "If today is {s}, tomorrow is {v}."),
)

RELATIONS = (MONTH_LENGTHS, NEXT_MONTH, NEXT_DAY)
