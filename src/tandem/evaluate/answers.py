"""Is an answer right? The check that evaluation and pair filtering share."""

from __future__ import annotations

import re
from collections.abc import Sequence


def contains_accepted(answer: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted texts stands in the answer as whole words, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in accepted
    )


def first_sentence(text: str) -> str:
    """The text up to its first full stop before a space, or its first line break."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
