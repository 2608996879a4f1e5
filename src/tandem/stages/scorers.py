"""Who ranks a model's answers in the pairs stage: a reward model, or a judge on a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console

from tandem.artifact.hashing import hash_json, hash_weights
from tandem.model.load import model_folder
from tandem.pairs.judge import QUESTION, read_verdict, verdict_request
from tandem.pairs.prompts import Prompt
from tandem.pairs.server import Failure
from tandem.recipe.making_pairs import Rank, Server
from tandem.stages.writers import open_server
from tandem.train.device import choose_device
from tandem.train.runtime import Runtime

# Answers that a reward model scores between two lines of the journal.
_AT_ONCE = 64
# Characters of a verdict that cannot be read.
_SHOWN = 200

Asked = tuple[int, Prompt, str]
"""An answer's number, its prompt, and its text."""
Scored = list[tuple[int, float]]


class Scorer(Protocol):
    """Gives answers numbers."""

    facts: dict[str, Any]
    """What scores depend on, and the data card says of the scorer."""
    failed: dict[int, Failure]
    """Those of the last answers that got no score, by number."""

    def scores(self, asked: Sequence[Asked]) -> Iterator[Scored]:
        """The scores that could be had, unit by unit."""


def scorer_identity(rank: Rank) -> Any:
    """What scores depend on: a hash of weights, or a server's address, model and question."""
    if rank.judge is not None:
        question = hash_json(QUESTION)
        return {"base_url": rank.judge.base_url, "model": rank.judge.model, "question": question}
    assert rank.reward_model is not None
    return hash_weights(model_folder(rank.reward_model))


def open_scorer(rank: Rank, runtime: Runtime, console: Console) -> Scorer:
    """The scorer that a recipe asks for, its model loaded; raises UserError where it cannot be."""
    if rank.judge is not None:
        return _Judge(rank.judge, console)
    assert rank.reward_model is not None
    return _Reward(rank.reward_model, runtime)


class _Reward:
    def __init__(self, name: str, runtime: Runtime) -> None:
        from tandem.model.reward import RewardModel

        device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
        folder = model_folder(name)
        self._model = RewardModel(folder, dtype=device.weights, device=device.torch_device)
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": name, "weights": hash_weights(folder), "by": "transformers",
            "dtype": device.dtype_name, "device": device.kind,
        }  # fmt: skip

    def scores(self, asked: Sequence[Asked]) -> Iterator[Scored]:
        """Deterministic, a few at a time."""
        self.failed.clear()
        for at in range(0, len(asked), _AT_ONCE):
            some = []
            for one in asked[at : at + _AT_ONCE]:
                if reason := self._model.left_out(one[1].turns):
                    self.failed[one[0]] = Failure(reason, "of the reward model")
                else:
                    some.append(one)
            found = self._model.scores([(prompt.turns, text) for _, prompt, text in some])
            unit: Scored = []
            for (number, _, _), score in zip(some, found, strict=True):
                if score is None:
                    self.failed[number] = Failure("beyond the reward model's context", "")
                else:
                    unit.append((number, score))
            yield unit


class _Judge:
    def __init__(self, server: Server, console: Console) -> None:
        self._server = server
        self._client = open_server(server, console)
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": server.model, "by": f"the server at {server.base_url}", "question": QUESTION,
        }  # fmt: skip

    def scores(self, asked: Sequence[Asked]) -> Iterator[Scored]:
        """Verdict by verdict, as they arrive."""
        self.failed.clear()
        requests = (
            verdict_request(prompt, text, self._server.limit_key) for _, prompt, text in asked
        )
        for place, found in self._client.answers(requests):
            number = asked[place][0]
            if isinstance(found, Failure):
                self.failed[number] = found
                yield []
                continue
            score = read_verdict(found.text)
            if score is None:
                said = " ".join(found.text.split())[:_SHOWN]
                self.failed[number] = Failure("unreadable verdict", said)
                yield []
            else:
                yield [(number, score)]
