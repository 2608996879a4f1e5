"""Words by a plain reading, for comparison."""

from __future__ import annotations

import re


def plain_words(text: str) -> list[str]:
    """What `hash_words` is to see in texts of tests."""
    spaced = re.sub(r"([\u0e00-\u0e7f\u3040-\u9fff])", r" \1 ", text.lower())
    return re.findall(r"[0-9a-z\u00c0-\u024f\u0400-\u04ff\u0e00-\u0e7f\u3040-\u9fff]+", spaced)
