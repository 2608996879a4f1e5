"""What is asked: prompts with the set's own answers, streamed from instruction data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tandem.data.ledger import Ledger
from tandem.data.read_records import OnBadRecord, read_conversations, read_questions
from tandem.data.records import Conversation, Origin, Turn
from tandem.data.sources.chunks import Row
from tandem.data.sources.rows import read_rows
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, the set's own answer, and the texts a right answer contains, if known.

    `turns` are a system turn, if there is one, and a user's; `source` counts the data sets.
    """

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]
    origin: Origin
    source: int = 0

    @property
    def system(self) -> str:
        """The system turn's text, empty when there is none."""
        return "".join(turn.content for turn in self.turns if turn.role == "system")

    @property
    def question(self) -> str:
        """The user's text."""
        return self.turns[-1].content


def read_prompts(
    sources: Sequence[DataSource], keep: str, ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[Prompt]:
    """Prompts with their answers, from questions or from conversations' first exchanges.

    Conversations that cannot be used go to the ledger, and so do unparsable lines when they are to
    be dropped; a bad question stops it.

    Raises UserError when keep is "wrong" and a source does not say what is right.
    """
    for number, source in enumerate(sources):
        first = next((row for row in read_rows(source) if isinstance(row, Row)), None)
        if first is not None and {"question", "answer"} <= first.fields.keys():
            for q in read_questions([source]):
                yield Prompt(q.turns, q.answer, q.accepted, q.origin, number)
            continue
        if keep == "wrong":
            raise UserError(
                f"{source.path}: pairs.keep is `wrong`, which needs rows of `question`, `answer` "
                "and `accepted`; use keep: different for conversations"
            )
        for conversation in read_conversations([source], ledger, on_bad_record):
            found = _first_exchange(conversation, number)
            if isinstance(found, str):
                ledger.dropped(conversation.origin, found)
            else:
                yield found


def _first_exchange(conversation: Conversation, source: int) -> Prompt | str:
    """The first question and its answer, or why a pair cannot be made of them."""
    turns = conversation.turns
    if conversation.tools or any(turn.calls or turn.role == "tool" for turn in turns):
        return "pairs are not made of exchanges with tools"
    if any(turn.reasoned for turn in turns):
        return "pairs are not made of answers with reasoning beside them"
    end = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    asked = turns[:end]
    roles = [turn.role for turn in asked]
    if roles not in (["user"], ["system", "user"]):
        return "the first answer is not to one question"
    if not turns[end].content.strip():
        return "the first answer is empty"
    return Prompt(asked, turns[end].content, (), conversation.origin, source)
