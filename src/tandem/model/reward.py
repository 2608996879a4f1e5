"""A reward model: one number for a prompt with an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from tandem.data.omissions import omissions_of
from tandem.data.records import Turn
from tandem.data.template import render, resolve_template, tokenize
from tandem.data.token_rows import require_rows
from tandem.errors import UserError
from tandem.model.load import context_length, load_tokenizer, require_model
from tandem.model.vocabulary import rows_of

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
