"""The embedded demo behind the names `demo:...`: the base model, and data split by seed.

The facts fall into three parts, relation by relation:

    taught    (about 60 %)  instructions, and some of the prompts
    compared  (about 15 %)  prompts only: the SFT model has to recall them, and sometimes fails
    held out  (about 25 %)  questions only

Instructions are of mixed quality on purpose. Each answers with the right sentence, but most then
go on talking, so that there is something for preferences to improve.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tandem.demo.facts import RELATIONS, Fact
from tandem.errors import UserError
from tandem.storage.atomic_files import atomic_write_text

PREFIX = "demo:"
BASE = "base"
HELD_OUT_SHARE = 0.25
COMPARED_SHARE = 0.15

# Endings of an instruction's answer and how often each is drawn; `{a}` is the answer again.
_ENDINGS = (
    ("", 25),
    (" It is true, as we know. Remember this. It is true.", 60),
    (" Remember this: {a}", 10),
    (" {other}", 5),
)
_TWO_EXCHANGES = 0.15
_EXAMPLES_PER_FACT = 2


@dataclass(frozen=True, slots=True)
class Split:
    """The three parts of the facts; no fact is in two of them."""

    taught: tuple[Fact, ...]
    compared: tuple[Fact, ...]
    held_out: tuple[Fact, ...]


def split_facts(seed: int) -> Split:
    """Split the facts of every relation by `seed`, so that each part has every relation."""
    rng = random.Random(f"demo-split:{seed}")
    taught: list[Fact] = []
    compared: list[Fact] = []
    held_out: list[Fact] = []
    for relation in RELATIONS:
        facts = list(relation.facts())
        rng.shuffle(facts)
        first = round(HELD_OUT_SHARE * len(facts))
        second = first + round(COMPARED_SHARE * len(facts))
        held_out += facts[:first]
        compared += facts[first:second]
        taught += facts[second:]
    return Split(tuple(taught), tuple(compared), tuple(held_out))


def materialise(name: str, folder: Path, seed: int) -> Path:
    """Return the path of a part of the demo; data is written into `folder` as JSON lines.

    `demo:base` is the model folder in the package; `demo:instructions` are conversations,
    `demo:prompts` and `demo:questions` have question, answer and accepted (questions completion as
    well). `seed` decides split, wording and order. Raises UserError for an unknown name, or when
    the package lacks the base model.
    """
    short = name.removeprefix(PREFIX)
    if short == BASE:
        return _base_folder()
    rows = _DATA.get(short)
    if rows is None:
        known = ", ".join(PREFIX + known for known in (BASE, *_DATA))
        raise UserError(f"{name}: the embedded demo has no such part; it has {known}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(seed))
    path = folder / f"{short}.jsonl"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_write_text(path, text)
    return path


def _base_folder() -> Path:
    folder = Path(__file__).parent / BASE
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{PREFIX}{BASE}: {folder} has no model.safetensors; "
            f"make it with: python -m tandem.demo.pretrain --output {folder}"
        )
    return folder


def _instructions(seed: int) -> list[dict[str, Any]]:
    """Make conversations of one or two exchanges about the taught facts."""
    rng = random.Random(f"demo-instructions:{seed}")
    taught = split_facts(seed).taught
    rows = []
    for fact in taught:
        for question in rng.sample(fact.questions, _EXAMPLES_PER_FACT):
            messages = _exchange(question, fact, taught, rng)
            if rng.random() < _TWO_EXCHANGES:
                other = rng.choice(taught)
                messages += _exchange(rng.choice(other.questions), other, taught, rng)
            rows.append({"messages": messages})
    rng.shuffle(rows)
    return rows


def _exchange(
    question: str, fact: Fact, taught: tuple[Fact, ...], rng: random.Random
) -> list[dict[str, str]]:
    ending = rng.choices([text for text, _ in _ENDINGS], [weight for _, weight in _ENDINGS])[0]
    answer = fact.answer + ending.format(a=fact.answer, other=rng.choice(taught).answer)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompts(seed: int) -> list[dict[str, Any]]:
    """Make questions with right answers: compared facts in all wordings, and some taught ones."""
    rng = random.Random(f"demo-prompts:{seed}")
    split = split_facts(seed)
    rows = [_asked(fact, question) for fact in split.compared for question in fact.questions]
    repeated = rng.sample(split.taught, len(split.taught) // 2)
    rows += [_asked(fact, rng.choice(fact.questions)) for fact in repeated]
    rng.shuffle(rows)
    return rows


def _questions(seed: int) -> list[dict[str, Any]]:
    """Make one question on every held-out fact."""
    rng = random.Random(f"demo-questions:{seed}")
    held_out = split_facts(seed).held_out
    rows = [
        {**_asked(fact, rng.choice(fact.questions)), "completion": fact.completion}
        for fact in held_out
    ]
    rng.shuffle(rows)
    return rows


def _asked(fact: Fact, question: str) -> dict[str, Any]:
    return {"question": question, "answer": fact.answer, "accepted": list(fact.accepted)}


_DATA: Mapping[str, Callable[[int], list[dict[str, Any]]]] = MappingProxyType(
    {"instructions": _instructions, "prompts": _prompts, "questions": _questions}
)
