"""What a row of data is on its way from a file to tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem.recipe.choices import Role

# The key of an answer's reasoning in `Turn.extra`.
REASONING = "reasoning_content"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record came from: the file (or Hub id) and its row, counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands in a row for a value that cannot be had, and why; `text` where it is a text.

    It matters only where the value is read.
    """

    reason: str
    text: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `trained` only matters for assistant turns.

    `extra` is a JSON object of what else a chat template gets of the message: `tool_calls` (its
    `content` may be null there) and `reasoning_content` of an assistant turn, `name` and
    `tool_call_id` of a tool's.
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
        """Whether the assistant's reasoning stands beside what it says."""
        return REASONING in self.more()

    def more(self) -> dict[str, Any]:
        """What `extra` holds."""
        return json.loads(self.extra) if self.extra else {}

    def message(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more()}


@dataclass(frozen=True, slots=True)
class Conversation:
    """An instruction record: turns that end with an assistant's.

    `tools` is a JSON list of the functions that the assistant may call, or empty.
    """

    turns: tuple[Turn, ...]
    origin: Origin
    tools: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A preference record: one prompt, the preferred answer and the other one.

    `tools` is as in `Conversation`.
    """

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    origin: Origin
    tools: str = ""


def prompt_key(record: Conversation | PreferencePair) -> int:
    """A 64-bit hash of a record's prompt, as it is before anything is cut.

    A conversation's is everything before its first trained answer.
    """
    turns: Sequence[Turn]
    if isinstance(record, PreferencePair):
        turns = record.prompt
    else:
        answers = (i for i, t in enumerate(record.turns) if t.role == "assistant" and t.trained)
        turns = record.turns[: next(answers, len(record.turns))]
    text = json.dumps([record.tools, *([turn.role, turn.content, turn.extra] for turn in turns)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
