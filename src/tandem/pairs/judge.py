"""A judge that a server has: what it is asked about an answer, and how its verdict is read."""

from __future__ import annotations

import re

from tandem.pairs.prompts import Prompt
from tandem.pairs.server import ChatRequest

QUESTION = """\
Rate the answer below from 1 (useless) to 10 (could not be better). Correctness comes first, then \
whether it does what was asked; length is no merit of its own. Reply with the number alone.

[Question]
{question}

[Answer]
{answer}

[End of the answer. Your number:]"""
"""What a judge is asked; `question` has the system text before it, if there is one."""


def verdict_request(prompt: Prompt, answer: str, limit_key: str) -> ChatRequest:
    """The request for a number, at temperature 0."""
    question = f"{prompt.system}\n\n{prompt.question}" if prompt.system else prompt.question
    text = QUESTION.format(question=question, answer=answer)
    return ChatRequest(({"role": "user", "content": text},), {"temperature": 0, limit_key: 16})


def read_verdict(text: str) -> float | None:
    """The number from 1 to 10 that a verdict says; None when it says none, or several."""
    found = set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)", re.sub(r"/\s*10\b", "", text)))
    if len(found) != 1:
        return None
    number = float(found.pop())
    return number if 1 <= number <= 10 else None
