"""A judge of answers that a server has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console

from tandem.evaluate.judge import Judge, Messages
from tandem.pairs.server import ChatRequest, Failure
from tandem.recipe.making_pairs import Server
from tandem.stages.writers import open_server
from tandem.train.progress import say

# Tokens of a verdict and what comes before it.
_MOST = 1024


def server_judge(server: Server, console: Console) -> Judge:
    """A judge from a recipe's server section.

    Raises UserError when its key is not there; nothing is sent yet.
    """
    client = open_server(server, console)
    options = {"temperature": 0, server.limit_key: _MOST}

    def ask(many: Sequence[Messages]) -> Iterator[tuple[int, str | None]]:
        failed: Counter[str] = Counter()
        first: Failure | None = None
        for number, found in client.answers(ChatRequest(one, options) for one in many):
            if isinstance(found, Failure):
                failed[found.reason] += 1
                first = first or found
                yield number, None
            else:
                yield number, found.text
        if failed:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in failed.most_common())
            say(
                console,
                f"{server.model} gave no answer to {failed.total()} requests ({reasons}); the "
                f"first: {first}",
            )

    return Judge(server.model, ask)
