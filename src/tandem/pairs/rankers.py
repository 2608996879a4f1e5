"""A judge that a server has: what it is asked about an answer, and how its verdict is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from tandem.data.records import Turn
from tandem.data.tokenize.added_tokens import require_rows
from tandem.data.tokenize.chat_template import render, resolve_template, tokenize
from tandem.data.tokenize.template_omissions import omissions_of
from tandem.errors import UserError
from tandem.integrations.chat_server import ChatRequest, Failure
from tandem.model.added_tokens import rows_of
from tandem.model.load_model import context_length, load_tokenizer, model_folder, require_model
from tandem.pairs.generators import open_server
from tandem.pairs.prompts import Prompt
from tandem.recipe.pairs_settings import RankSettings, ServerSettings
from tandem.recipe.run_settings import Runtime
from tandem.runtime.device import choose_device
from tandem.storage.hashing import hash_json, hash_weights

QUESTION = """\
Rate the answer below from 1 (useless) to 10 (could not be better). Correctness comes first, then \
whether it does what was asked; length is no merit of its own. Reply with the number alone.

[Question]
{question}

[Answer]
{answer}

[End of the answer. Your number:]"""
"""What a judge is asked; `question` has the system text before it, if there is one."""


def verdict_request(prompt: Prompt, answer: str, limit_key: str) -> ChatRequest:
    """The request for a number, at temperature 0."""
    question = f"{prompt.system}\n\n{prompt.question}" if prompt.system else prompt.question
    text = QUESTION.format(question=question, answer=answer)
    return ChatRequest(({"role": "user", "content": text},), {"temperature": 0, limit_key: 16})


def read_verdict(text: str) -> float | None:
    """The number from 1 to 10 that a verdict says; None when it says none, or several."""
    found = set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)", re.sub(r"/\s*10\b", "", text)))
    if len(found) != 1:
        return None
    number = float(found.pop())
    return number if 1 <= number <= 10 else None


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


def scorer_identity(rank: RankSettings) -> Any:
    """What scores depend on: a hash of weights, or a server's address, model and question."""
    if rank.judge is not None:
        question = hash_json(QUESTION)
        return {"base_url": rank.judge.base_url, "model": rank.judge.model, "question": question}
    assert rank.reward_model is not None
    return hash_weights(model_folder(rank.reward_model))


def open_scorer(rank: RankSettings, runtime: Runtime, console: Console) -> Scorer:
    """The scorer that a recipe asks for, its model loaded; raises UserError where it cannot be."""
    if rank.judge is not None:
        return _Judge(rank.judge, console)
    assert rank.reward_model is not None
    return _Reward(rank.reward_model, runtime)


class _Reward:
    def __init__(self, name: str, runtime: Runtime) -> None:

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
    def __init__(self, server: ServerSettings, console: Console) -> None:
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


_BATCH_ROWS = 16


class RewardModel:
    """A sequence classifier with one label, asked in its own chat template.

    Args:
        folder: a model folder.
        dtype: of the weights.
        device: where they go.

    Raises UserError for a folder that holds no such model, or one without a chat template.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> None:
        require_model(folder)
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True
            )
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            line = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder} cannot be loaded as a reward model: {line}") from None
        labels = model.config.get_text_config().num_labels
        if labels != 1 or found["missing_keys"]:
            what = (
                f"it has {labels} labels, not one"
                if labels != 1
                else f"its files lack {sorted(found['missing_keys'])[0]}"
            )
            raise UserError(
                f"pairs.rank.reward_model: {folder} is no reward model: {what}. Name a sequence "
                "classifier that was trained to score answers."
            )
        self.tokenizer = load_tokenizer(folder)
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"pairs.rank.reward_model: {folder} has no chat template, so nobody can say how it "
                "wants to read an answer. Put the one it was trained with into its folder."
            )
        own = resolve_template(self.tokenizer, None)
        self._template = replace(own, name="the reward model's own")
        self._omissions = omissions_of(self.tokenizer, self._template)
        self._model = model.to(device).eval()
        self._context = context_length(model.config)

    def left_out(self, turns: Sequence[Turn]) -> str:
        """Why the model would not read all of some turns before an answer, empty when it would."""
        answered = [*turns, Turn("assistant", "That.")]
        return self._omissions.of_answers(answered, [len(turns)], reasoned=False)

    def scores(self, asked: Sequence[tuple[Sequence[Turn], str]]) -> list[float | None]:
        """The score of each answer to its turns, None for one beyond the model's context.

        Texts of equal length share a batch, and nothing is padded: which position of a padded row
        counts differs between models.
        """
        texts = [
            render(
                self.tokenizer, self._template, [*turns, Turn("assistant", answer)], prompt=False
            )
            for turns, answer in asked
        ]
        ids = tokenize(self.tokenizer, texts)
        for row in ids:
            require_rows(row, rows_of(self._model), self.tokenizer.decode)
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(ids):
            if self._context is None or len(row) <= self._context:
                groups.setdefault(len(row), []).append(place)
        found: list[float | None] = [None] * len(asked)
        rows = _BATCH_ROWS if self._model.config.get_text_config().pad_token_id is not None else 1
        for members in groups.values():
            for at in range(0, len(members), rows):
                some = members[at : at + rows]
                for place, score in zip(some, self._batch([ids[i] for i in some]), strict=True):
                    found[place] = score
        return found

    def _batch(self, rows: list[list[int]]) -> Any:
        batch = torch.tensor(rows, device=self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
        return logits[:, 0].float().tolist()
