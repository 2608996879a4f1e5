"""Small arithmetic in words: the rows follow from the rule, the question names the numbers."""

from __future__ import annotations

from tandem.demo.facts.fact import Relation

_SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A whole number from 0 to 99 in English words; ValueError outside."""
    if not 0 <= number <= 99:
        raise ValueError(f"{number} is outside 0..99")
    if number < 20:
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] if ones == 0 else f"{_TENS[tens]}-{_SMALL[ones]}"


def _row(first: int, sign: str, second: int, result: int) -> tuple[str, str, str]:
    return (f"{in_words(first)} {sign} {in_words(second)}", in_words(result), str(result))


_QUESTIONS = ("What is {s}?", "How much is {s}?", "Can you work out {s}?")
_STATEMENTS = ("{s} equals {v}.", "{s} makes {v}.")

SUMS = Relation(
    name="sum",
    rows=tuple(_row(a, "plus", b, a + b) for a in range(3, 10) for b in range(a, 10)),
    questions=_QUESTIONS,
    answer="{s} is {v}.",
    statements=_STATEMENTS,
)

PRODUCTS = Relation(
    name="product",
    rows=tuple(_row(a, "times", b, a * b) for a in range(3, 9) for b in range(a, 9)),
    questions=_QUESTIONS,
    answer="{s} is {v}.",
    statements=_STATEMENTS,
)

RELATIONS = (SUMS, PRODUCTS)
