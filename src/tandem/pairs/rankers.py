"""Who scores answers: a reward model in this process, or a judge that a server has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from tandem.data.records import Origin, Turn
from tandem.data.sources.rows import is_local
from tandem.data.tokenize.chat_template import render, resolve_template, tokenize
from tandem.data.tokenize.template_omissions import omissions_of
from tandem.data.tokenize.vocabulary import require_rows
from tandem.errors import UserError
from tandem.integrations.chat_server import ChatRequest, ChatServer, Failure, first_answer
from tandem.integrations.choose import device_of
from tandem.model.model_folder import (
    context_length,
    first_line,
    load_tokenizer,
    model_folder,
    require_model,
)
from tandem.pairs.generators import PairsModel, check_local_model
from tandem.pairs.prompts import Prompt
from tandem.recipe.pairs_settings import RankSettings, ServerSettings
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.console import log
from tandem.storage.atomic_files import read_json
from tandem.storage.hashing import hash_json, hash_weights

if TYPE_CHECKING:
    import torch

QUESTION = """\
Rate the answer below from 1 (useless) to 10 (could not be better). Correctness comes first, then \
whether it does what was asked; length is no merit of its own. Reply with the number alone.

[Question]
{question}

[Answer]
{answer}

[End of the answer. Your number:]"""
"""What a judge is asked; `question` has the system text before it, if there is one."""
TRIAL = ("What is two and two?", "It is 4")
"""A question and an answer that a judge is asked about before a run depends on it."""


def score_request(prompt: Prompt, answer: str, limit_key: str) -> ChatRequest:
    """The request for a number, at temperature 0."""
    question = f"{prompt.system}\n\n{prompt.question}" if prompt.system else prompt.question
    text = QUESTION.format(question=question, answer=answer)
    return ChatRequest(({"role": "user", "content": text},), {"temperature": 0, limit_key: 16})


def read_score(text: str) -> float | None:
    """The number from 1 to 10 that a verdict says; None when it says none, or several."""
    alone = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")
    numbers = set(alone.findall(re.sub(r"/\s*10\b", "", text)))
    if len(numbers) != 1:
        return None
    number = float(numbers.pop())
    return number if 1 <= number <= 10 else None


# Answers that a reward model scores before they are recorded.
_AT_ONCE = 64
_BATCH_ROWS = 16
# Characters shown of a verdict that cannot be read.
_SHOWN = 200

Answer = tuple[int, Prompt, str]
"""An answer's number, its prompt, and its text."""
Scored = list[tuple[int, float]]


class Ranker(PairsModel, Protocol):
    """Scores answers."""

    def scores(self, answers: Sequence[Answer]) -> Iterator[Scored]:
        """The scores of answers, unit by unit; those that fail are in `failed`."""


def choose_ranker(settings: RankSettings, runtime: RunSettings) -> Ranker:
    """The ranker that a recipe asks for."""
    if settings.judge is not None:
        return Judge(settings.judge)
    assert settings.reward_model is not None
    return RewardModel(settings.reward_model, runtime)


class RewardModel:
    """A sequence classifier with one label in this process, asked in its own chat template."""

    def __init__(self, name: str, runtime: RunSettings) -> None:
        self._name, self._runtime = name, runtime
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {}

    @property
    def identity(self) -> str:
        """The hash of the weights."""
        return hash_weights(model_folder(self._name))

    def check(self) -> None:
        """Raise UserError for a folder whose files show that it is no reward model."""
        try:
            check_local_model(self._name)
        except UserError as error:
            raise UserError(f"pairs.rank.reward_model: {error}") from None
        if is_local(self._name):
            folder = model_folder(self._name)
            _check_labels(folder)
            if not _has_template(folder):
                raise _without_template(folder)

    def reach(self) -> None:
        """Nothing is to be reached."""

    def open(self, console: Console) -> None:  # noqa: ARG002
        """Load the model; raises UserError for one that is no reward model."""
        folder = model_folder(self._name)
        device = device_of(self._runtime)
        model = _load_classifier(folder, device.weights)
        self._tokenizer = load_tokenizer(folder)
        if not getattr(self._tokenizer, "chat_template", None):
            raise _without_template(folder)
        own = resolve_template(self._tokenizer, None)
        self._template = replace(own, name="the reward model's own")
        self._omissions = omissions_of(self._tokenizer, self._template)
        self._model = model.to(device.torch_device).eval()
        self._context = context_length(model.config)
        self.facts = {
            "model": self._name, "weights": hash_weights(folder), "by": "transformers",
            "dtype": device.dtype_name, "device": device.kind,
        }  # fmt: skip

    def scores(self, answers: Sequence[Answer]) -> Iterator[Scored]:
        """Deterministic, a few at a time."""
        self.failed.clear()
        for at in range(0, len(answers), _AT_ONCE):
            yield self._scored(answers[at : at + _AT_ONCE])

    def _scored(self, answers: Sequence[Answer]) -> Scored:
        """The scores of answers that fit into the model's context.

        Texts of equal length share a batch, and nothing is padded: models differ in the position of
        a padded row that they score.
        """
        from tandem.model.added_tokens import rows_of

        numbers, texts = [], []
        for number, prompt, answer in answers:
            turns = [*prompt.turns, Turn("assistant", "That.")]
            reason = self._omissions.of_answers(turns, [len(prompt.turns)], reasoned=False)
            if reason:
                self.failed[number] = Failure(reason, "of the reward model")
                continue
            turns[-1] = Turn("assistant", answer)
            numbers.append(number)
            texts.append(render(self._tokenizer, self._template, turns, prompt=False))
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for number, ids in zip(numbers, tokenize(self._tokenizer, texts), strict=True):
            require_rows(ids, rows_of(self._model), self._tokenizer.decode)
            if self._context is None or len(ids) <= self._context:
                by_length.setdefault(len(ids), []).append((number, ids))
            else:
                self.failed[number] = Failure("beyond the reward model's context", "")
        scores: dict[int, float] = {}
        rows = _BATCH_ROWS if self._model.config.get_text_config().pad_token_id is not None else 1
        for alike in by_length.values():
            for at in range(0, len(alike), rows):
                some, ids_of = zip(*alike[at : at + rows], strict=True)
                scores |= zip(some, self._batch(list(ids_of)), strict=True)
        return [(number, scores[number]) for number in numbers if number in scores]

    def _batch(self, rows: list[list[int]]) -> list[float]:
        import torch

        batch = torch.tensor(rows, device=self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


def _check_labels(folder: Path) -> None:
    """Raise UserError for a configuration that says how many labels there are, and not one."""
    try:
        config = read_json(folder / "config.json")
        labels = config.get("id2label", config.get("text_config", {}).get("id2label"))
        classifies = any("SequenceClassification" in name for name in config["architectures"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # said when it is loaded
    if not classifies:
        raise _no_reward_model(folder, "its config.json names no sequence classifier")
    if isinstance(labels, dict) and len(labels) != 1:
        raise _no_reward_model(folder, f"it has {len(labels)} labels, not one")


def _has_template(folder: Path) -> bool:
    """Whether a tokenizer's files have a chat template, as far as they can be read."""
    if (folder / "chat_template.json").exists() or any(folder.rglob("*.jinja")):
        return True
    try:
        return "chat_template" in read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError, TypeError):
        return True  # said when it is loaded


def _without_template(folder: Path) -> UserError:
    return UserError(
        f"pairs.rank.reward_model: {folder} has no chat template, so it is unknown how it reads "
        "an answer. Put the one it was trained with into its folder."
    )


def _no_reward_model(folder: Path, what: str) -> UserError:
    return UserError(
        f"pairs.rank.reward_model: {folder} is no reward model: {what}. Name a sequence "
        "classifier that was trained to score answers."
    )


def _load_classifier(folder: Path, dtype: torch.dtype) -> Any:
    """A classifier with one label; raises UserError for a folder that holds none."""
    from transformers import AutoModelForSequenceClassification

    require_model(folder)
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        why = first_line(error)
        raise UserError(f"{folder} cannot be loaded as a reward model: {why}") from None
    labels = model.config.get_text_config().num_labels
    if labels != 1:
        what = f"it has {labels} labels, not one"
    elif loaded["missing_keys"]:
        what = f"its files lack {sorted(loaded['missing_keys'])[0]}"
    else:
        return model
    raise _no_reward_model(folder, what)


class Judge:
    """A judge that a server has."""

    def __init__(self, server: ServerSettings) -> None:
        self._server = server
        self.failed: dict[int, Failure] = {}
        self.facts: dict[str, Any] = {
            "model": server.model, "by": f"the server at {server.base_url}", "question": QUESTION,
        }  # fmt: skip

    @property
    def identity(self) -> dict[str, str]:
        """Its address, what it calls the model, and the hash of the question."""
        server = self._server
        return {
            "base_url": server.base_url, "model": server.model, "question": hash_json(QUESTION)
        }  # fmt: skip

    def check(self) -> None:
        """Raise UserError for a key that is not there."""
        ChatServer(self._server)

    def reach(self) -> None:
        """Raise UserError for a judge that does not answer, or not with a number."""
        question, answer = TRIAL
        prompt = Prompt((Turn("user", question),), "", (), Origin("", 0))
        request = score_request(prompt, answer, self._server.limit_key)
        verdict = first_answer(self._server, request, "pairs.rank.judge")
        if verdict is not None and read_score(verdict.text) is None:
            shown = " ".join(verdict.text.split())[:_SHOWN]
            raise UserError(
                f"pairs.rank.judge: asked to rate an answer, {self._server.model!r} says "
                f"{shown!r}, which is not a single number from 1 to 10. Name a model that replies "
                "with the number alone; one that reasons first must have that turned off."
            )

    def open(self, console: Console) -> None:
        """Read the key; nothing is sent yet."""
        self._client = ChatServer(self._server, log=lambda text: log(console, text))

    def scores(self, answers: Sequence[Answer]) -> Iterator[Scored]:
        """Verdict by verdict, as they arrive."""
        self.failed.clear()
        limit = self._server.limit_key
        requests = (score_request(prompt, text, limit) for _, prompt, text in answers)
        for place, reply in self._client.answers(requests):
            number, score = answers[place][0], None
            if isinstance(reply, Failure):
                self.failed[number] = reply
            elif (score := read_score(reply.text)) is None:
                shown = " ".join(reply.text.split())[:_SHOWN]
                self.failed[number] = Failure("unreadable verdict", shown)
            yield [] if score is None else [(number, score)]
