"""Which records share their prompt, or words in a row, with other sets."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.check.findings import Sign, Tally, excerpt
from tandem.check.record_signs import Record, body_of, question_of
from tandem.data.records import Origin
from tandem.data.text.contamination import RUN, Other, many_words, prompt_digest
from tandem.data.text.word_hashes import Words


def look_for_shared(
    records: Sequence[Record], words: Words, others: Sequence[Other], tally: Tally
) -> None:
    """Count the prompts, and else the words in a row, that other sets have as well.

    Args:
        records: [n].
        words: those of their bodies, [n] texts.
        others: the sets.
        tally: counts.
    """
    for other in others:
        prompts, runs = _signs(other.name)
        whole = set()
        for number, record in enumerate(records):
            question = question_of(record)
            at = other.prompt(prompt_digest(question)) if many_words(question) else None
            if at is not None:
                whole.add(number)
                said = _like(at, other, question) if tally.wants(prompts) else ""
                tally.add_example(prompts, record.origin, said)
        for number, at in other.shared(words):
            if number not in whole:
                said = ""
                if tally.wants(runs):
                    said = _like(at, other, other.words_shared(body_of(records[number])))
                tally.add_example(runs, records[number].origin, said)


def _signs(other: str) -> tuple[Sign, Sign]:
    """The signs that a prompt, and that words in a row, are in another set as well."""
    return (
        Sign(
            "shared_prompts",
            f"prompts that are in {other} as well",
            "warning",
            "What is scored there would be trained on: take them out on one side.",
            about=other,
        ),
        Sign(
            "shared_words",
            f"texts with {RUN} words in a row of {other}",
            "warning",
            "What is scored there may be trained on: look at the rows, take them out.",
            about=other,
        ),
    )


def _like(origin: Origin, other: Other, text: str) -> str:
    where = f"row {origin.row} there" if origin.file == other.name else str(origin)
    return f"as {where}: {excerpt(text)}"
