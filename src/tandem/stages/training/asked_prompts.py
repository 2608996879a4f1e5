"""The prompts that a training stage's settings name, as tokens."""

from __future__ import annotations

from pathlib import Path

from tandem.data.formats.conversations import Question
from tandem.data.read_records import read_questions
from tandem.data.records import Turn
from tandem.data.resolve_sources import resolve_sources
from tandem.data.tokenize.chat_template import prompt_ids
from tandem.data.tokenize.template_omissions import check_asked
from tandem.data.tokenize.vocabulary import NoRow, require_rows
from tandem.errors import UserError
from tandem.model.base_model import BaseModelInfo
from tandem.model.model_folder import context_length
from tandem.recipe.training_settings import TrainingSettings
from tandem.train.callbacks.answer_prompts import AskedPrompt


def asked_prompts(
    settings: TrainingSettings, base: BaseModelInfo, beside: Path, seed: int
) -> list[AskedPrompt]:
    """Encode what `samples` asks; none without that section.

    `beside` and `seed` are as in `resolve_sources`. Raises UserError for what the model cannot be
    asked: a bad question, a token without a row, and a prompt that leaves its answer no room.
    """
    samples = settings.samples
    if samples is None:
        return []
    asked: list[tuple[str, tuple[Turn, ...]]] = [
        (f"samples.prompts, number {number}", (Turn("user", text),))
        for number, text in enumerate(samples.prompts, start=1)
    ]
    questions: list[Question] = []
    if samples.questions:
        questions = read_questions(resolve_sources(samples.questions, beside, seed))
    check_asked(base.tokenizer, base.template, questions, base.name)
    asked += [(str(question.origin), question.turns) for question in questions]
    context, prompts = context_length(base.config), []
    for where, turns in asked:
        ids = prompt_ids(base.tokenizer, base.template, turns)
        try:
            require_rows(ids, base.rows, base.tokenizer.decode)
        except NoRow as error:
            raise UserError(f"{where}: {error}") from None
        if context is not None and len(ids) + samples.max_new_tokens > context:
            raise UserError(
                f"{where}: {len(ids)} tokens and an answer of samples.max_new_tokens "
                f"{samples.max_new_tokens} exceed the model's context of {context}. Shorten the "
                "prompt, or lower samples.max_new_tokens"
            )
        system = "\n".join(turn.content for turn in turns if turn.role == "system")
        prompts.append(AskedPrompt(turns[-1].content, ids, system))
    return prompts
