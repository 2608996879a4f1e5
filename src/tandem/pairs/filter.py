"""Which generated answer becomes a pair's rejected one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.evaluate.answers import contains_accepted


@dataclass(frozen=True)
class Candidate:
    """A generated answer and whether the model ended it by itself."""

    text: str
    stopped: bool


def choose_rejected(
    chosen: str,
    accepted: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    keep: str,
    dropped: Counter[str],
) -> str | None:
    """The first candidate that may stand against `chosen`, or None.

    Args:
        chosen: the preferred answer.
        accepted: texts of which a right answer contains one; needed for keep "wrong".
        candidates: what the weaker model wrote.
        keep: "different" takes any other answer, "wrong" only one that lacks every accepted
            text or did not stop.
        dropped: counts the candidates passed over, by reason.
    """
    for candidate in candidates:
        text = candidate.text.strip()
        if not text:
            dropped["empty"] += 1
        elif text.split() == chosen.split():
            dropped["same as chosen"] += 1
        elif keep == "wrong" and candidate.stopped and contains_accepted(text, accepted):
            dropped["right"] += 1
        else:
            return text
    return None
