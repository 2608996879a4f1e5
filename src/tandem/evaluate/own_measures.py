"""A loaded model that is asked and scored: our own measures, item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from tandem.data.batching.collate import collate
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.example import Example, conversation_example
from tandem.data.encoded.worker_pool import EncodingWork
from tandem.data.formats.conversations import Question
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.text.text_traits import contains_accepted, first_sentence
from tandem.data.tokenize.chat_template import ChatTemplate, prompt_ids
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, Exchange, encode_exchanges
from tandem.data.tokenize.template_omissions import check_asked, way_out
from tandem.data.tokenize.vocabulary import NoRow, require_rows
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.evaluate.eval_model import EvalModel
from tandem.evaluate.scores import ModelScores, Score, per_item
from tandem.model.added_tokens import rows_of
from tandem.model.attention.select import choose_backend
from tandem.model.companion_files import all_stop_ids
from tandem.model.generate import GeneratedAnswer, Sampling, generate_answers
from tandem.model.logprobs.output_head import scores_head
from tandem.model.logprobs.sequence_logps import micro_batches, sequence_logps
from tandem.model.model_folder import context_length
from tandem.model.prepare_model import FOR_ANSWERS, FOR_SCORING, Preparation, prepare_model
from tandem.recipe.data_source import DataSource
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.console import log, phase
from tandem.runtime.device import Device
from tandem.train.objectives.objective import sequence_tokens, trained_tokens
from tandem.train.token_budget import token_budget

_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Material:
    """What models are asked and scored on."""

    questions: Sequence[Question]  # with known answers
    pairs: Sequence[DataSource]  # held-out preference pairs
    heldout: Sequence[DataSource]  # held-out conversations
    max_new_tokens: int  # of an answer
    limit: int | None  # only the first so many of each; None: all

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.questions or self.pairs or self.heldout)


class OwnMeasures:
    """One model, loaded, that is asked and scored."""

    def __init__(
        self,
        model: EvalModel,
        tokenizer: Any,
        template: ChatTemplate,
        device: Device,
        runtime: RunSettings,
        console: Console,
    ) -> None:
        self.label, self._folder, config = model.label, model.folder, model.config
        self.console, self.device = console, device
        self.tokenizer, self.template = tokenizer, template
        self._base = model.load_base(device, lambda text: log(console, f"{model.label}: {text}"))
        own = device.attention(runtime.attention, self._base)
        self.backend, why = own or choose_backend(runtime.attention, self._base)
        if self.backend == "padded":
            log(console, f"{self.label}: attention padded ({why})")
        prepare_model(self._base, FOR_ANSWERS, Preparation())
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
        """Generate first, with transformers' own attention, then score log-probs over trees.

        `completions`: whether a base model also completes questions as the beginning of a text.
        """
        scores: dict[str, Score] = {}
        texts: list[str] = []
        questions = material.questions
        check_asked(self.tokenizer, self.template, questions, self.label)
        if questions:
            prompts = [prompt_ids(self.tokenizer, self.template, q.turns) for q in questions]
            answers = self._generate(prompts, questions, material.max_new_tokens, "answers")
            texts = self._decode(answers)
            scores |= _answer_scores(questions, answers, texts)
        if completions and (asked := [q for q in questions if q.completion]):
            prompts = self.tokenizer([q.completion for q in asked])["input_ids"]
            answers = self._generate(prompts, asked, material.max_new_tokens, "completions")
            answered = zip(self._decode(answers), asked, strict=True)
            right = [contains_accepted(first_sentence(text), q.accepted) for text, q in answered]
            scores["completion_accuracy"] = per_item([float(one) for one in right])
        prepare_model(self._base, FOR_SCORING, Preparation(attention=self.backend))
        if questions:
            scores["loss"] = self._loss(self._conversations(questions))
        if material.heldout:
            scores["heldout_loss"] = self._loss(self._heldout(material, "conversations", "scored"))
        if material.pairs:
            scores |= self._preferences(self._heldout(material, "preference pairs", "compared"))
        return ModelScores(scores, texts)

    def _generate(
        self, prompts: list[list[int]], questions: Sequence[Question], most: int, what: str
    ) -> list[GeneratedAnswer]:
        for ids, question in zip(prompts, questions, strict=True):
            try:
                require_rows(ids, self._rows, self.tokenizer.decode)
            except NoRow as error:
                raise UserError(f"{question.origin}: {error}") from None
            self._check_room(question, len(ids), most)
        with phase(self.console, f"{self.label}: {what}", len(prompts)) as advance:
            stops = all_stop_ids(self._folder, self.tokenizer, self.template)
            return generate_answers(
                self.model, prompts, stop_ids=stops, sampling=Sampling(most), advance=advance
            )

    def _decode(self, answers: Sequence[GeneratedAnswer]) -> list[str]:
        ids = [list(answer.ids) for answer in answers]
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer.of(self.tokenizer, self.template, self._rows)

    def _conversations(self, questions: Sequence[Question]) -> list[Example]:
        exchanges = [Exchange(q.turns, q.answer, q.origin) for q in questions]
        examples = []
        encoded = encode_exchanges(self._chat(), exchanges)
        for one, question in zip(encoded, questions, strict=True):
            if not isinstance(one, Encoded):
                why = f"{one.reason} ({one.detail})" if one.detail else one.reason
                raise UserError(
                    f"{question.origin}: the question with its answer cannot be encoded: {why}. "
                    f"{way_out(one.reason)}"
                )
            self._check_room(question, len(one.ids), 0)
            examples.append(conversation_example([one], question.origin))
        return examples

    def _check_room(self, question: Question, tokens: int, answer: int) -> None:
        if self.context is not None and tokens + answer > self.context:
            raise UserError(
                f"{question.origin}: {tokens} tokens"
                + (f" and an answer of evaluate.max_new_tokens {answer}" if answer else "")
                + f" exceed the model's context of {self.context}. Shorten or remove the question"
                + (", or lower evaluate.max_new_tokens." if answer else ".")
            )

    def _heldout(self, material: Material, kind: Kind, done: str) -> EncodedDataset:
        """The user's own records within the model's context; what cannot be used is logged."""
        ledger, paired = Ledger(None), kind == "preference pairs"
        what, sources = ("pairs", material.pairs) if paired else (kind, material.heldout)
        options = EncodingOptions(kind, Limits(self.context or _NO_LIMIT, None), "stop")
        work = EncodingWork(limit=material.limit)
        dataset = build_dataset(sources, self._chat(), options, ledger, work)
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
        return dataset

    def _loss(self, examples: Sequence[Example]) -> Score:
        losses = (-self._score(examples).sum(1)).tolist()
        tokens = tuple(float(trained_tokens(example)) for example in examples)
        return Score(_items(examples), tuple(losses), tokens)

    def _preferences(self, pairs: Sequence[Example]) -> dict[str, Score]:
        # Per token: summed log-probs would prefer the shorter answer whatever it says.
        lengths = torch.tensor([sequence_tokens(pair) for pair in pairs])
        margins = (self._score(pairs) / lengths).diff(dim=1).neg()[:, 0]
        items = _items(pairs)
        return {
            "preference_accuracy": Score(items, tuple((margins > 0).double().tolist())),
            "preference_margin": Score(items, tuple(margins.tolist())),
        }

    def _score(self, examples: Sequence[Example]) -> torch.Tensor:
        """Log-probs of each example's sequences [examples, sequences of an example]."""
        wide = max(len(example.branches) for example in examples)
        scores = torch.zeros(len(examples), wide, dtype=torch.float64)
        with torch.no_grad():
            for members in micro_batches(self.model, examples, self.budget):
                batch = collate([examples[i] for i in members]).to(self.device.torch_device)
                logps = sequence_logps(self.model, batch, self.device.sums).cpu().double()
                row = 0
                for i in members:
                    count = len(examples[i].branches)
                    scores[i, :count] = logps[row : row + count]
                    row += count
        return scores


def _answer_scores(
    questions: Sequence[Question], answers: Sequence[GeneratedAnswer], texts: Sequence[str]
) -> dict[str, Score]:
    right, cut = [], []
    for question, answer, text in zip(questions, answers, texts, strict=True):
        # Later text may contradict the right one, so only a finished answer is right.
        has_it = contains_accepted(text, question.accepted)
        right.append(float(has_it and answer.stopped))
        cut.append(float(has_it and not answer.stopped))
    return {
        "answer_accuracy": per_item(right),
        "right_cut": per_item(cut),
        "stop_rate": per_item([float(answer.stopped) for answer in answers]),
        "mean_answer_tokens": per_item([float(len(answer.ids)) for answer in answers]),
    }


def _items(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(f"{example.origin.file}:{example.origin.row}" for example in examples)
