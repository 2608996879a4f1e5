"""How many tokens a record may have, and what one beyond that loses."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.recipe.choices import TooLong


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits: a whole sequence, and its prompt part when that must give way.

    `prompt` None lets a prompt have half of `sequence`, or what the answer leaves if more.
    `too_long` is what a record beyond them loses.
    """

    sequence: int
    prompt: int | None
    too_long: TooLong = "drop_old_turns"

    def for_prompt(self, answer_tokens: int) -> int:
        """How many tokens a prompt may keep in a sequence that is too long."""
        if self.too_long == "keep_end":
            room = self.sequence - answer_tokens
            return room if self.prompt is None else min(self.prompt, room)
        if self.prompt is not None:
            return min(self.prompt, self.sequence - 1)
        if self.too_long == "keep_start":
            return self.sequence - 1
        return min(max(self.sequence // 2, self.sequence - answer_tokens), self.sequence - 1)
