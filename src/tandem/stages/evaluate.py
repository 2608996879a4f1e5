"""At the end: base, SFT and final model answer the same held-out questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.artifact.files import atomic_write_json, read_json
from tandem.artifact.hashing import hash_weights
from tandem.artifact.lock import folder_lock
from tandem.artifact.manifest import finish_stage, open_stage, start_stage
from tandem.data.collate import collate
from tandem.data.encode import Chat, Encoded, Exchange, conversation_tree, encode_exchanges
from tandem.data.formats import Question
from tandem.data.ledger import Ledger
from tandem.data.prepare import prepare_pairs
from tandem.data.reading import read_questions
from tandem.data.records import Tree
from tandem.data.sources import SourceSpec
from tandem.data.template import ChatTemplate, prompt_ids, resolve_template, stop_ids
from tandem.errors import UserError
from tandem.evaluate.answers import contains_accepted, first_sentence
from tandem.model.attention import choose_backend, use_backend
from tandem.model.generate import Answer, generate_answers
from tandem.model.load import context_length, load_config, load_model, load_tokenizer, model_folder
from tandem.model.score import check_head, micro_batches, sequence_logps
from tandem.recipe.schema import Evaluate
from tandem.stages.sources import data_identity, source_specs
from tandem.train.device import Device, choose_device, token_budget
from tandem.train.objective import sequence_tokens, trained_tokens
from tandem.train.progress import phase, say
from tandem.train.runtime import Runtime

_NO_LIMIT = 2**31
# A fall of this share of right answers from SFT to DPO is called a collapse.
_COLLAPSE = 0.1


@dataclass(frozen=True)
class Asked:
    """One model's answers and scores."""

    results: dict[str, float | str]
    answers: list[str]


def run_evaluation(
    *,
    models: Mapping[str, str],
    settings: Evaluate,
    output_dir: Path,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    console: Console,
) -> dict[str, Any]:
    """Ask every model, write evaluation.json, and return what it says.

    Args:
        models: folders by label; the one called "base" is asked in completion form as well.
        settings: questions, held-out pairs and answer length.
        output_dir: the stage's folder.
        chat_template: for models without one of their own.
        seed: of the embedded demo's data.
        runtime: device, dtype, attention.
        console: for progress.
    """
    folders = {label: model_folder(path) for label, path in models.items()}
    questions = source_specs(settings.questions, output_dir.parent, seed)
    pairs = source_specs(settings.pairs, output_dir.parent, seed)
    inputs = {
        "models": {label: hash_weights(folder) for label, folder in folders.items()},
        "questions": data_identity(questions),
        "pairs": data_identity(pairs),
        "settings": settings.model_dump(mode="json", exclude={"questions", "pairs"}),
        "chat_template": chat_template,
    }
    with folder_lock(output_dir):
        path = output_dir / "evaluation.json"
        if open_stage(output_dir, "evaluate", inputs).state == "finished":
            found: dict[str, Any] = read_json(path)
            return found
        start_stage(output_dir, "evaluate", inputs, {"models": dict(models)})
        asked_questions = read_questions(questions) if questions else []
        device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
        asked = {}
        for label, folder in folders.items():
            examiner = _Examiner(folder, chat_template, device, runtime, console, label)
            asked[label] = examiner.ask(asked_questions, pairs, settings)
        evaluation = {
            "models": {
                label: {"path": models[label], **one.results} for label, one in asked.items()
            },
            "counts": {
                "questions": len(asked_questions),
                "pairs": int(next(iter(asked.values())).results.pop("pairs", 0)),
            },
            "samples": _samples(asked_questions, asked, settings.samples),
            "warnings": _warnings({label: one.results for label, one in asked.items()}),
        }
        atomic_write_json(path, evaluation)
        finish_stage(output_dir, ["evaluation.json"])
    return evaluation


class _Examiner:
    """A loaded model that is asked and scored."""

    def __init__(
        self,
        folder: Path,
        chat_template: str | None,
        device: Device,
        runtime: Runtime,
        console: Console,
        label: str,
    ) -> None:
        self.label = label
        self.console = console
        config = load_config(folder)
        self.tokenizer = load_tokenizer(folder)
        own = getattr(self.tokenizer, "chat_template", None)
        self.template: ChatTemplate = resolve_template(
            self.tokenizer, None if own else chat_template
        )
        self.model = load_model(folder, dtype=device.weights, device=device.torch_device)
        self.device = device
        self.backend, why = choose_backend(
            runtime.attention, self.model, static_shapes=device.static_shapes
        )
        if self.backend == "padded":
            say(console, f"{label}: attention padded ({why})")
        check_head(self.model)
        self.budget = token_budget(runtime.tokens_per_microbatch, device, config)
        self.context = context_length(config)

    def ask(
        self, questions: Sequence[Question], pairs: Sequence[SourceSpec], settings: Evaluate
    ) -> Asked:
        """Generation first, with transformers' own attention, then log-probs over trees."""
        results: dict[str, float | str] = {}
        texts: list[str] = []
        if questions:
            texts = self._answer(questions, settings, results)
            if self.label == "base":
                self._complete(questions, settings, results)
        use_backend(self.model, self.backend)
        if questions:
            trees = self._conversations(questions)
            logps = self._score(trees)
            results["loss"] = -float(logps.sum()) / sum(trained_tokens(tree) for tree in trees)
        if pairs:
            self._prefer(pairs, results)
        return Asked(results, texts)

    def _generate(self, prompts: list[list[int]], settings: Evaluate, what: str) -> list[Answer]:
        with phase(self.console, f"{self.label}: {what}", len(prompts)) as advance:
            return generate_answers(
                self.model,
                prompts,
                stop_ids=stop_ids(self.tokenizer, self.template),
                max_new_tokens=settings.max_new_tokens,
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

    def _answer(
        self, questions: Sequence[Question], settings: Evaluate, results: dict[str, float | str]
    ) -> list[str]:
        prompts = [prompt_ids(self.tokenizer, self.template, q.turns) for q in questions]
        for ids, question in zip(prompts, questions, strict=True):
            self._check_room(question, len(ids), settings.max_new_tokens)
        answers = self._generate(prompts, settings, "answers")
        texts = self._decode(answers)
        right = [
            answer.stopped and contains_accepted(text, question.accepted)
            for answer, text, question in zip(answers, texts, questions, strict=True)
        ]
        results["answer_accuracy"] = sum(right) / len(right)
        results["stop_rate"] = sum(answer.stopped for answer in answers) / len(answers)
        results["mean_answer_tokens"] = sum(len(a.ids) for a in answers) / len(answers)
        return texts

    def _complete(
        self, questions: Sequence[Question], settings: Evaluate, results: dict[str, float | str]
    ) -> None:
        asked = [q for q in questions if q.completion]
        if not asked:
            return
        prompts = self.tokenizer([q.completion for q in asked])["input_ids"]
        for ids, question in zip(prompts, asked, strict=True):
            self._check_room(question, len(ids), settings.max_new_tokens)
        texts = self._decode(self._generate(prompts, settings, "completions"))
        right = [
            contains_accepted(first_sentence(text), question.accepted)
            for text, question in zip(texts, asked, strict=True)
        ]
        results["completion_accuracy"] = sum(right) / len(right)

    def _conversations(self, questions: Sequence[Question]) -> list[Tree]:
        exchanges = [Exchange(q.turns, q.answer, q.origin) for q in questions]
        trees = []
        encoded = encode_exchanges(Chat.of(self.tokenizer, self.template), exchanges)
        for one, question in zip(encoded, questions, strict=True):
            if not isinstance(one, Encoded):
                raise UserError(f"{question.origin}: the question cannot be encoded: {one}")
            self._check_room(question, len(one.ids), 0)
            trees.append(conversation_tree([one], question.origin))
        return trees

    def _check_room(self, question: Question, tokens: int, answer: int) -> None:
        if self.context is not None and tokens + answer > self.context:
            raise UserError(
                f"{question.origin}: {tokens} tokens"
                + (f" and an answer of evaluate.max_new_tokens {answer}" if answer else "")
                + f" exceed the model's context of {self.context}. Shorten or remove the question"
                + (", or lower evaluate.max_new_tokens." if answer else ".")
            )

    def _prefer(self, pairs: Sequence[SourceSpec], results: dict[str, float | str]) -> None:
        ledger = Ledger(None)
        trees = prepare_pairs(
            pairs,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=self.context or _NO_LIMIT,
            ledger=ledger,
        )
        counts = ledger.counts
        if counts["truncated"] or counts["dropped"]:
            say(
                self.console,
                f"{self.label}: of {counts['read']} pairs, {counts['truncated']} were cut to the "
                f"model's context of {self.context} and {counts['dropped']} cannot be compared",
            )
        # Per token: summed log-probs would prefer the shorter answer whatever it says.
        lengths = torch.tensor([sequence_tokens(tree) for tree in trees])
        margins = (self._score(trees) / lengths).diff(dim=1).neg()[:, 0]
        results["preference_accuracy"] = float((margins > 0).double().mean())
        results["preference_margin"] = float(margins.mean())
        results["pairs"] = len(trees)

    def _score(self, trees: Sequence[Tree]) -> torch.Tensor:
        found = torch.zeros(len(trees), len(trees[0].branches), dtype=torch.float64)
        with torch.no_grad():
            for members in micro_batches(self.model, trees, self.budget):
                batch = collate([trees[i] for i in members]).to(self.device.torch_device)
                logps = sequence_logps(self.model, batch, self.device.sums).cpu().double()
                found[list(members)] = logps.view(len(members), -1)
        return found


def _samples(
    questions: Sequence[Question], asked: Mapping[str, Asked], count: int
) -> list[dict[str, Any]]:
    stride = max(1, len(questions) // max(1, count))
    return [
        {
            "prompt": questions[i].turns[-1].content,
            "expected": questions[i].answer,
            "answers": {label: one.answers[i] for label, one in asked.items()},
        }
        for i in range(0, len(questions), stride)[:count]
    ]


def _warnings(results: Mapping[str, Mapping[str, float | str]]) -> list[str]:
    before = results.get("sft", {}).get("answer_accuracy")
    after = results.get("dpo", {}).get("answer_accuracy")
    if before is None or after is None or float(before) - float(after) <= _COLLAPSE:
        return []
    return [
        f"collapse: DPO lost right answers, {float(before):.0%} -> {float(after):.0%}; prefer "
        "answers the model can give, lower the learning rate or raise beta"
    ]
