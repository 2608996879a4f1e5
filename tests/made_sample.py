"""A small stand-in for the real data of ../shared/data, made of the demo's own facts and model.

Records have the shape of the real ones: answers from one sentence to several hundred, system
prompts in some of them, two exchanges in some, answers that share their beginning.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.demo.embedded import materialise
from tandem.demo.facts import Fact, all_facts

CONVERSATIONS, PAIRS = 1200, 400
_SYSTEM = ("", "You are an AI assistant. Give a detailed answer.", "You answer in one sentence.")


def write_sample(folder: Path) -> Path:
    """Write a model, conversations and pairs below a folder, named as the real ones are.

    Returns:
        The folder, with `models/stories260K`, `conversations/slimorca_format.jsonl`,
        `pairs/orca_dpo_pairs.jsonl` and `pairs/mixed_pairs.jsonl`.
    """
    rng = random.Random(8)
    shutil.copytree(materialise("demo:base", folder, 0), folder / "models" / "stories260K")
    _write(
        folder / "conversations" / "slimorca_format.jsonl",
        map(_conversation, [rng] * CONVERSATIONS),
    )
    for name in ("orca_dpo_pairs", "mixed_pairs"):
        _write(folder / "pairs" / f"{name}.jsonl", [_pair(rng) for _ in range(PAIRS)])
    return folder


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _conversation(rng: random.Random) -> dict[str, Any]:
    system = rng.choice(_SYSTEM)
    turns = [{"from": "system", "value": system, "weight": None}] if system else []
    for _ in range(rng.choice((1, 1, 1, 2))):
        fact = rng.choice(all_facts())
        turns += [
            {"from": "human", "value": _question(fact, rng), "weight": 0.0},
            {"from": "gpt", "value": _answer(fact, rng), "weight": 1.0},
        ]
    return {"conversations": turns}


def _pair(rng: random.Random) -> dict[str, str]:
    fact = rng.choice(all_facts())
    rejected = _answer(rng.choice(all_facts()), rng)
    if rng.random() < 0.3:  # the answers begin alike
        rejected = f"{fact.answer} {rejected}"
    chosen = _answer(fact, rng)
    while chosen == rejected:
        rejected = _answer(rng.choice(all_facts()), rng)
    system = rng.choice(_SYSTEM)
    question = _question(fact, rng)
    return {"system": system, "question": question, "chosen": chosen, "rejected": rejected}


def _question(fact: Fact, rng: random.Random) -> str:
    """A question, in some records after a text of many sentences."""
    before = _sentences(rng, rng.choice((0, 0, 0, 5, 20, 60)))
    return " ".join([*before, rng.choice(fact.questions)])


def _answer(fact: Fact, rng: random.Random) -> str:
    """The fact, and many others after it in most records: lengths differ as real ones do."""
    return " ".join([fact.answer, *_sentences(rng, int(rng.lognormvariate(2, 1.2)))])


def _sentences(rng: random.Random, count: int) -> list[str]:
    return [fact.answer for fact in rng.choices(all_facts(), k=count)]
