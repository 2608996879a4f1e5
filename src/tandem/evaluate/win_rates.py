"""Side by side: a judge says which of two answers is better, asked in both orders.

After MT-Bench's pairwise judge (arXiv 2306.05685): an answer wins where it is preferred in both
orders; otherwise the pair is a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from tandem.errors import UserError
from tandem.evaluate.scores import Score
from tandem.integrations.chat_server import ChatRequest, ChatServer, Failure
from tandem.recipe.pairs_settings import ServerSettings
from tandem.runtime.console import log
from tandem.storage.hashing import hash_json
from tandem.storage.journal import Journal

Messages = tuple[Mapping[str, str], ...]
# Takes many conversations; yields each one's number and answer, or None, as they arrive.
Ask = Callable[[Sequence[Messages]], Iterator[tuple[int, str | None]]]
Verdict = Literal["A", "B", "tie"]
# One file has all judges' verdicts, each under its own key.
_JOURNAL = "verdicts"

PROMPT = """\
Two assistants answered the same question. Say which answer is better: first by correctness, then \
by whether it does what was asked, then by clarity. Length is no merit of its own, and neither is \
the order in which the answers stand here.

[Question]
{question}

[Answer A]
{one}
[End of answer A]

[Answer B]
{other}
[End of answer B]

End with a line that holds your verdict and nothing else: [[A]] if answer A is better, [[B]] if \
answer B is better, [[C]] for a tie."""
"""What the judge is asked."""


@dataclass(frozen=True)
class Judge:
    """A judge: its name, for results, and how it is asked."""

    name: str
    ask: Ask


@dataclass(frozen=True)
class Duel:
    """A question and two answers to it: a model's, and the one's it is compared with."""

    item: str
    question: str
    answer: str
    against: str


@dataclass(frozen=True)
class Verdicts:
    """A judge's verdicts on the answers of one model."""

    score: Score  # 1 for a win, 0.5 for a tie, 0 for a loss, by item; the mean is the win rate
    # of the judged items
    wins: int
    ties: int
    losses: int
    identical: int  # ties that the judge was not asked about, for the answers are the same text
    consistent: float | None  # share of the asked items with the same verdict in both orders
    # share of the verdicts for one side that went to the answer shown first
    first_shown: float | None
    unread: int  # items without a verdict in both orders: no answer came, or none could be read

    def as_json(self) -> dict[str, Any]:
        """Plain values for evaluation.json, the items apart."""
        values = {key: value for key, value in vars(self).items() if key != "score"}
        return {"win_rate": self.score.value, "error": self.score.error, **values}


def judge_duels(
    judge: Judge, duels: Sequence[Duel], file: Path, advance: Callable[[int], None]
) -> Verdicts:
    """Let a judge decide duels, each asked twice; `advance` counts questions that are decided.

    Verdicts are written to the file as they come; only missing ones are asked for. Raises UserError
    for a file that is damaged, or has other contents.
    """
    asked = [d for d in duels if d.answer != d.against]
    with Journal(file, _JOURNAL) as journal:
        known = _known(journal)
        orders = [(duel, swapped) for duel in asked for swapped in (False, True)]
        missing = [one for one in orders if _key(judge, *one) not in known]
        advance(len(orders) - len(missing))
        messages = [_messages(*one) for one in missing]
        for number, text in judge.ask(messages) if messages else ():
            verdict = None if text is None else read_preference(text)
            if verdict is not None:
                key = _key(judge, *missing[number])
                journal.add({"key": key, "judge": judge.name, "verdict": verdict})
                known[key] = verdict
            advance(1)
    both = {
        duel.item: tuple(known.get(_key(judge, duel, swapped)) for swapped in (False, True))
        for duel in asked
    }
    return _verdicts(duels, both)


def _known(journal: Journal) -> dict[str, Verdict]:
    """The verdicts of a file by their keys."""
    known: dict[str, Verdict] = {}
    for line, one in enumerate(journal.entries, start=2):
        match one:
            case {"key": str(key), "verdict": "A" | "B" | "tie" as verdict}:
                known[key] = verdict
            case _:
                raise UserError(
                    f"{journal.path}, line {line}: no verdict. Restore the file, or remove it to "
                    "ask anew."
                )
    return known


def read_preference(text: str) -> Verdict | None:
    """The verdict that a judge's text ends with, None if there is none."""
    marks = re.findall(r"\[\[([ABC])\]\]", text)
    verdicts: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}
    return verdicts[marks[-1]] if marks else None


def _messages(duel: Duel, swapped: bool) -> Messages:
    one, other = (duel.against, duel.answer) if swapped else (duel.answer, duel.against)
    text = PROMPT.format(question=duel.question, one=one, other=other)
    return ({"role": "user", "content": text},)


def _key(judge: Judge, duel: Duel, swapped: bool) -> str:
    return hash_json([judge.name, _messages(duel, swapped)[0]["content"]])


def _verdicts(duels: Sequence[Duel], both: Mapping[str, tuple[Verdict | None, ...]]) -> Verdicts:
    items, values = [], []
    agreed = first = sided = unread = identical = 0
    for duel in duels:
        if duel.item not in both:
            identical += 1
            items.append(duel.item)
            values.append(0.5)
            continue
        plain, swapped = both[duel.item]
        if plain is None or swapped is None:
            unread += 1
            continue
        for verdict in (plain, swapped):
            sided += verdict != "tie"
            first += verdict == "A"
        same = (plain, swapped) in (("A", "B"), ("B", "A"), ("tie", "tie"))
        agreed += same
        items.append(duel.item)
        values.append((1.0 if plain == "A" else 0.0) if same and plain != "tie" else 0.5)
    asked = len(items) - identical
    return Verdicts(
        Score(tuple(items), tuple(values)),
        wins=values.count(1.0),
        ties=values.count(0.5),
        losses=values.count(0.0),
        identical=identical,
        consistent=agreed / asked if asked else None,
        first_shown=first / sided if sided else None,
        unread=unread,
    )


# Tokens of a verdict and what comes before it.
_MOST = 1024


def server_judge(server: ServerSettings, console: Console) -> Judge:
    """A judge from a recipe's server section; raises UserError when its key is not there."""
    client = ChatServer(server, log=lambda text: log(console, text))
    options = {"temperature": 0, server.limit_key: _MOST}

    def ask(many: Sequence[Messages]) -> Iterator[tuple[int, str | None]]:
        """Ask the server, and log at the end how many requests got no answer, and why."""
        failed: Counter[str] = Counter()
        first: Failure | None = None
        for number, reply in client.answers(ChatRequest(one, options) for one in many):
            if isinstance(reply, Failure):
                failed[reply.reason] += 1
                first = first or reply
                yield number, None
            else:
                yield number, reply.text
        if failed:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in failed.most_common())
            lost = f"gave no answer to {failed.total()} requests ({reasons}); the first: {first}"
            log(console, f"{server.model} {lost}")

    return Judge(server.model, ask)
