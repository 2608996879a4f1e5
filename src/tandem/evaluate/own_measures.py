"""A loaded model that is asked and scored: our own measures, item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from tandem.data.batching.collate import collate
from tandem.data.build_dataset import prepare_conversations, prepare_pairs
from tandem.data.formats.conversations import Question
from tandem.data.ledger import Ledger
from tandem.data.records import Example
from tandem.data.text.answers import contains_accepted, first_sentence
from tandem.data.tokenize.added_tokens import NoRow, require_rows
from tandem.data.tokenize.chat_template import ChatTemplate, prompt_ids
from tandem.data.tokenize.encode import (
    ChatTokenizer,
    Encoded,
    Exchange,
    conversation_example,
    encode_exchanges,
)
from tandem.data.tokenize.template_omissions import check_asked, way_out
from tandem.errors import UserError
from tandem.evaluate.eval_model import EvalModel
from tandem.evaluate.scores import ModelScores, Score, per_item
from tandem.model.added_tokens import rows_of
from tandem.model.attention.select import choose_backend, use_backend
from tandem.model.companion_files import all_stop_ids
from tandem.model.generate import Answer, generate_answers
from tandem.model.load_model import context_length
from tandem.model.logprobs.output_head import scores_head
from tandem.model.logprobs.sequence_logps import check_head, micro_batches, sequence_logps
from tandem.recipe.data_source import DataSource
from tandem.recipe.run_settings import Runtime
from tandem.runtime.console import log, phase
from tandem.runtime.device import Device, token_budget
from tandem.train.losses.objectives import sequence_tokens, trained_tokens

_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Material:
    """What models are asked and scored on.

    Attributes:
        questions: with known answers.
        pairs: held-out preference pairs.
        heldout: held-out conversations.
        max_new_tokens: of an answer.
        limit: only the first so many of each; None: all.
    """

    questions: Sequence[Question]
    pairs: Sequence[DataSource]
    heldout: Sequence[DataSource]
    max_new_tokens: int
    limit: int | None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.questions or self.pairs or self.heldout)


class OwnMeasures:
    """One model, loaded."""

    def __init__(
        self,
        model: EvalModel,
        tokenizer: Any,
        template: ChatTemplate,
        device: Device,
        runtime: Runtime,
        console: Console,
    ) -> None:
        self.label = model.label
        self._folder = model.folder
        self.console = console
        self.tokenizer = tokenizer
        self.template = template
        self.device = device
        config = model.config
        self._base = model.load_base(device)
        self.backend, why = choose_backend(
            runtime.attention, self._base, static_shapes=device.static_shapes
        )
        if self.backend == "padded":
            log(console, f"{self.label}: attention padded ({why})")
        check_head(self._base)
        self.model = model.with_adapter(self._base)
        if model.adapter is not None and not scores_head(self.model):
            raise UserError(
                f"{model.adapter} changes the output head, which evaluation scores without an "
                "adapter. Merge it with tandem merge, and evaluate the merged model."
            )
        self.budget = token_budget(runtime.tokens_per_microbatch, device, config)
        self.context = context_length(config)
        self._rows = rows_of(self.model)

    def take(self, material: Material, *, completions: bool) -> ModelScores:
        """Generation first, with transformers' own attention, then log-probs over trees.

        Args:
            material: what to ask.
            completions: whether questions are put as the beginning of a text as well, which a
                base model goes on with.
        """
        scores: dict[str, Score] = {}
        answers: list[str] = []
        check_asked(self.tokenizer, self.template, material.questions, self.label)
        if material.questions:
            answers = self._answer(material, scores)
            if completions:
                self._complete(material, scores)
        use_backend(self._base, self.backend)
        if material.questions:
            scores["loss"] = self._loss(self._conversations(material.questions))
        if material.heldout:
            scores["heldout_loss"] = self._loss(self._heldout(material))
        if material.pairs:
            self._prefer(material, scores)
        return ModelScores(scores, answers)

    def _generate(self, prompts: list[list[int]], most: int, what: str) -> list[Answer]:
        with phase(self.console, f"{self.label}: {what}", len(prompts)) as advance:
            return generate_answers(
                self.model,
                prompts,
                stop_ids=all_stop_ids(self._folder, self.tokenizer, self.template),
                max_new_tokens=most,
                temperature=0.0,
                top_p=1.0,
                seed=0,
                advance=advance,
            )

    def _decode(self, answers: Sequence[Answer]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            [list(answer.ids) for answer in answers], skip_special_tokens=True
        )
        return [text.strip() for text in texts]

    def _answer(self, material: Material, scores: dict[str, Score]) -> list[str]:
        questions = material.questions
        prompts = [prompt_ids(self.tokenizer, self.template, q.turns) for q in questions]
        for ids, question in zip(prompts, questions, strict=True):
            self._check_rows(question, ids)
            self._check_room(question, len(ids), material.max_new_tokens)
        answers = self._generate(prompts, material.max_new_tokens, "answers")
        texts = self._decode(answers)
        has_it = [
            contains_accepted(text, question.accepted)
            for text, question in zip(texts, questions, strict=True)
        ]
        ends = [answer.stopped for answer in answers]
        # What goes on after the right text may take it back, so that only an end makes it right.
        right = [has and end for has, end in zip(has_it, ends, strict=True)]
        cut = [has and not end for has, end in zip(has_it, ends, strict=True)]
        scores["answer_accuracy"] = per_item([float(r) for r in right])
        scores["right_cut"] = per_item([float(c) for c in cut])
        scores["stop_rate"] = per_item([float(answer.stopped) for answer in answers])
        scores["mean_answer_tokens"] = per_item([float(len(a.ids)) for a in answers])
        return texts

    def _complete(self, material: Material, scores: dict[str, Score]) -> None:
        asked = [q for q in material.questions if q.completion]
        if not asked:
            return
        prompts = self.tokenizer([q.completion for q in asked])["input_ids"]
        for ids, question in zip(prompts, asked, strict=True):
            self._check_rows(question, ids)
            self._check_room(question, len(ids), material.max_new_tokens)
        texts = self._decode(self._generate(prompts, material.max_new_tokens, "completions"))
        scores["completion_accuracy"] = per_item(
            [
                float(contains_accepted(first_sentence(text), question.accepted))
                for text, question in zip(texts, asked, strict=True)
            ]
        )

    def _conversations(self, questions: Sequence[Question]) -> list[Example]:
        exchanges = [Exchange(q.turns, q.answer, q.origin) for q in questions]
        trees = []
        encoded = encode_exchanges(
            ChatTokenizer.of(self.tokenizer, self.template, self._rows), exchanges
        )
        for one, question in zip(encoded, questions, strict=True):
            if not isinstance(one, Encoded):
                why = f"{one.reason} ({one.detail})" if one.detail else one.reason
                raise UserError(
                    f"{question.origin}: the question with its answer cannot be encoded: {why}. "
                    f"{way_out(one.reason)}"
                )
            self._check_room(question, len(one.ids), 0)
            trees.append(conversation_example([one], question.origin))
        return trees

    def _check_rows(self, question: Question, ids: Sequence[int]) -> None:
        try:
            require_rows(ids, self._rows, self.tokenizer.decode)
        except NoRow as error:
            raise UserError(f"{question.origin}: {error}") from None

    def _check_room(self, question: Question, tokens: int, answer: int) -> None:
        if self.context is not None and tokens + answer > self.context:
            raise UserError(
                f"{question.origin}: {tokens} tokens"
                + (f" and an answer of evaluate.max_new_tokens {answer}" if answer else "")
                + f" exceed the model's context of {self.context}. Shorten or remove the question"
                + (", or lower evaluate.max_new_tokens." if answer else ".")
            )

    def _heldout(self, material: Material) -> Sequence[Example]:
        ledger = Ledger(None)
        trees = prepare_conversations(
            material.heldout,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=self.context or _NO_LIMIT,
            ledger=ledger,
            limit=material.limit,
            rows=self._rows,
        )
        self._log(ledger, "conversations", "scored")
        return trees

    def _loss(self, trees: Sequence[Example]) -> Score:
        logps = self._score(trees)
        return Score(
            _items(trees),
            tuple((-logps.sum(1)).tolist()),
            tuple(float(trained_tokens(tree)) for tree in trees),
        )

    def _prefer(self, material: Material, scores: dict[str, Score]) -> None:
        ledger = Ledger(None)
        chosen = prepare_pairs(
            material.pairs,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=self.context or _NO_LIMIT,
            ledger=ledger,
            limit=material.limit,
            rows=self._rows,
        )
        self._log(ledger, "pairs", "compared")
        # Per token: summed log-probs would prefer the shorter answer whatever it says.
        lengths = torch.tensor([sequence_tokens(tree) for tree in chosen])
        margins = (self._score(chosen) / lengths).diff(dim=1).neg()[:, 0]
        items = _items(chosen)
        scores["preference_accuracy"] = Score(items, tuple((margins > 0).double().tolist()))
        scores["preference_margin"] = Score(items, tuple(margins.tolist()))

    def _log(self, ledger: Ledger, what: str, done: str) -> None:
        counts = ledger.counts
        if counts["truncated"] or counts["dropped"]:
            dropped = Counter(e.reason for e in ledger.entries if e.outcome == "dropped")
            why = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
            log(
                self.console,
                f"{self.label}: of {counts['read']} {what}, {counts['truncated']} were cut to the "
                f"model's context of {self.context} and {counts['dropped']} cannot be {done}"
                + (f" ({why})" if why else ""),
            )

    def _score(self, trees: Sequence[Example]) -> torch.Tensor:
        """Log-probs of each tree's sequences [trees, sequences of a tree]."""
        wide = max(len(tree.branches) for tree in trees)
        logps_of = torch.zeros(len(trees), wide, dtype=torch.float64)
        with torch.no_grad():
            for members in micro_batches(self.model, trees, self.budget):
                chosen = [trees[i] for i in members]
                batch = collate(chosen).to(self.device.torch_device)
                logps = sequence_logps(self.model, batch, self.device.sums).cpu().double()
                row = 0
                for i in members:
                    count = len(trees[i].branches)
                    logps_of[i, :count] = logps[row : row + count]
                    row += count
        return logps_of


def _items(trees: Sequence[Example]) -> tuple[str, ...]:
    return tuple(f"{tree.origin.file}:{tree.origin.row}" for tree in trees)
