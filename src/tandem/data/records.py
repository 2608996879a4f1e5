"""Records: what a row of data becomes on its way from a file to tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tandem.recipe.choices import Role

# The key of an answer's reasoning in `Turn.extra`.
REASONING = "reasoning_content"


@dataclass(frozen=True, slots=True)
class Origin:
    """The file (or Hub id) that a record came from and its row, counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in a row for a value that cannot be read; `text` says whether the value is a text."""

    reason: str
    text: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `trained` only matters for assistant turns.

    `extra` is a JSON object with what else a chat template gets: `tool_calls`, `content` (null)
    and `reasoning_content` of an assistant turn, `name` and `tool_call_id` of a tool's.
    """

    role: Role
    content: str
    trained: bool = True
    extra: str = ""

    @property
    def calls(self) -> bool:
        """Whether the assistant calls tools in this turn."""
        return "tool_calls" in self.more()

    @property
    def reasoned(self) -> bool:
        """Whether the assistant's reasoning stands beside its text."""
        return REASONING in self.more()

    def more(self) -> dict[str, Any]:
        """Return the content of `extra`."""
        return json.loads(self.extra) if self.extra else {}

    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more()}


@dataclass(frozen=True, slots=True)
class Conversation:
    """An instruction record: turns that end with an assistant's.

    `tools` is a JSON list of the functions that the assistant may call, or empty. `good` says
    whether the last answer is a good one, where that is what is learnt.
    """

    turns: tuple[Turn, ...]
    origin: Origin
    tools: str = ""
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference record: one prompt, and two or more answers, the best one first.

    `scores` say how good each answer is; they are empty for a pair.
    """

    prompt: tuple[Turn, ...]
    answers: tuple[str, ...]
    origin: Origin
    tools: str = ""
    scores: tuple[float, ...] = ()

    @property
    def chosen(self) -> str:
        """The best answer."""
        return self.answers[0]

    @property
    def rejected(self) -> str:
        """The worst answer."""
        return self.answers[-1]

    @property
    def named(self) -> list[tuple[str, str]]:
        """The answers with their names: chosen and rejected of a pair, else their numbers."""
        names = ["chosen", "rejected"]
        if len(self.answers) > 2:
            names = [f"answer {number}" for number in range(1, len(self.answers) + 1)]
        return list(zip(names, self.answers, strict=True))


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A record that is tokens already: which of `ids` are targets is in `trained`, as many bits.

    The first token is no target, because nothing predicts it; the last one is. `good` is as in a
    `Conversation`.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    origin: Origin
    good: bool | None = None

    @property
    def start(self) -> int:
        """The place of the first target: how many tokens the prompt has."""
        return self.trained.index(True)


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A preference pair that is tokens already: a prompt, the chosen and the rejected answer."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Document:
    """A text of which every token is trained, without a chat template."""

    text: str
    origin: Origin


# Records that chat templates render, and those that they do not.
ChatRecord = Conversation | Preference
TokenRecord = TokenRow | TokenPair
Record = ChatRecord | TokenRecord | Document


def prompt_key(record: Record) -> int:
    """Return a 64-bit hash of a record's uncut prompt: all before the first trained answer.

    That of a document is of all of it, so that its pieces are held out together.
    """
    if isinstance(record, Document):
        return _hash(json.dumps({"text": record.text}))
    if isinstance(record, TokenRow | TokenPair):
        prompt = record.prompt if isinstance(record, TokenPair) else record.ids[: record.start]
        return _hash(json.dumps(prompt))
    if isinstance(record, Preference):
        turns = record.prompt
    else:
        answers = (i for i, t in enumerate(record.turns) if t.role == "assistant" and t.trained)
        turns = record.turns[: next(answers, len(record.turns))]
    return _hash(
        json.dumps([record.tools, *([turn.role, turn.content, turn.extra] for turn in turns)])
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
