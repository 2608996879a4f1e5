"""Clean records to plant faults in: plain sentences, no two records alike."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NOUNS = ("river", "library", "engine", "garden", "harbour", "teacher", "violin", "window")
_VERBS = ("carries", "follows", "repairs", "describes", "paints", "measures", "remembers")
_MORE = ("slowly", "yesterday", "twice", "before", "dawn", "in", "winter", "near", "the", "station")

# A template of reasoning models, which forgets the thoughts of answers before the last one.
FORGETFUL = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences(rng: random.Random, count: int) -> str:
    """Some sentences of English."""
    made = []
    for _ in range(count):
        first, second = rng.sample(_NOUNS, 2)
        extra = " ".join(rng.sample(_MORE, 3))
        made.append(f"The {first} {rng.choice(_VERBS)} the {second} {extra} {rng.randrange(999)}.")
    return " ".join(made)


def conversation(seed: int, exchanges: int = 1) -> dict[str, Any]:
    """A record of `messages`."""
    rng = random.Random(seed)
    turns = []
    for _ in range(exchanges):
        turns.append({"role": "user", "content": f"What is it that {sentences(rng, 1)[:-1]}?"})
        turns.append({"role": "assistant", "content": sentences(rng, 4)})
    return {"messages": turns}


def pair(seed: int) -> dict[str, Any]:
    """A record of explicit preference."""
    rng = random.Random(-seed - 1)
    return {
        "prompt": f"Why is it that {sentences(rng, 1)[:-1]}?",
        "chosen": sentences(rng, 4),
        "rejected": sentences(rng, 3),
    }


def write(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """A JSON lines file; texts are lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
