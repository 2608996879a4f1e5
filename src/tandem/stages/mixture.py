"""How a training stage's data sets are mixed: the weight of each, and its share of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.data.order import Part
from tandem.data.sources import SourceSpec
from tandem.data.trees import Trees


def parts_of(trees: Trees, sources: Sequence[SourceSpec]) -> tuple[Part, ...]:
    """The records of each source with its weight, in reading order."""
    return tuple(
        Part(count, source.weight) for count, source in zip(trees.sources, sources, strict=True)
    )


def mixture_facts(parts: Sequence[Part], sources: Sequence[SourceSpec]) -> list[dict[str, Any]]:
    """Each source's records, weight, and what the first epoch shows of it, for summary.json."""
    shown = [part.shown(1) for part in parts]
    return [
        {
            "path": source.path,
            "split": source.split,
            "records": part.examples,
            "weight": part.weight,
            "shown": count,
            "share": count / sum(shown),
        }
        for part, source, count in zip(parts, sources, shown, strict=True)
    ]


def in_one_line(facts: Sequence[dict[str, Any]]) -> str:
    """What an epoch shows of each source; empty for a single one that is shown once."""
    if len(facts) == 1 and facts[0]["weight"] == 1.0:
        return ""
    each = ", ".join(
        f"{fact['share']:.1%} {fact['path']} ({fact['records']} records, weight {fact['weight']:g})"
        for fact in facts
    )
    return f"an epoch shows {sum(fact['shown'] for fact in facts)} records: {each}"
