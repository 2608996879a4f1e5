"""Generated answers do not depend on their batch; scores equal what plain transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.data.text.text_traits import contains_accepted, first_sentence
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template, stop_ids
from tandem.errors import UserError
from tandem.evaluate.evaluate_models import evaluate_models
from tandem.model.generate import Sampling, generate_answers
from tandem.model.load_model import load_model
from tandem.model.model_folder import load_tokenizer
from tandem.pairs import make_pairs as stage
from tandem.recipe.data_source import DataSource
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.pairs_settings import PairsSettings
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import evaluation_job, pairs_job

from .made_inputs import QUIET, WORDS, make_conversations, make_pairs


def make_questions(path: Path, count: int = 12) -> Path:
    with path.open("w") as file:
        for i in range(count):
            row = {
                "question": f"which word is number {i}? " + "please " * (i % 4),
                "answer": f"It is {WORDS[i % 10]}.",
                "accepted": [WORDS[i % 10]],
                "completion": f"Word {i} is",
            }
            file.write(json.dumps(row) + "\n")
    return path


def test_a_batch_answers_as_one_prompt_at_a_time(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float64)
    tokenizer = load_tokenizer(tiny_model)
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 4, 17, 1)]
    options: dict[str, Any] = {
        "stop_ids": [tokenizer.eos_token_id],
        "sampling": Sampling(12),
    }
    done: list[int] = []
    together = generate_answers(model, prompts, advance=done.append, **options)
    alone = [generate_answers(model, [p], advance=done.append, **options)[0] for p in prompts]
    assert together == alone
    assert sum(done) == 10


def test_sampling_follows_the_seed(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    first, again, other = (
        generate_answers(
            model, [[5, 6, 7]] * 4, stop_ids=[1], sampling=Sampling(8, 1.0, 0.9, seed=seed)
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_pairs_keep_the_sets_answer_and_generate_the_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    conversations = make_conversations(tmp_path / "c.jsonl")
    with conversations.open("a") as file:
        file.write('{"conversations": [{"from": "human", "value": "and then?"}]}\n')
    settings = PairsSettings(
        prompts=(DataSource(path=str(conversations)),),
        heldout=(DataSource(path=str(make_questions(tmp_path / "q.jsonl"))),),
        max_new_tokens=6,
    )
    stage.make_pairs(pairs_job(settings, tiny_model, tmp_path / "pairs"), QUIET)
    rows = read_jsonl(tmp_path / "pairs" / "pairs.jsonl")
    asked = [row["conversations"] for row in read_jsonl(conversations)][:24]
    assert [row["question"] for row in rows] == [turns[0]["value"] for turns in asked]
    assert [row["chosen"] for row in rows] == [turns[1]["value"] for turns in asked]
    assert all(row["rejected"] and row["rejected"] != row["chosen"] for row in rows)
    assert len(read_jsonl(tmp_path / "pairs" / "heldout.jsonl")) == 12
    summary = read_json(tmp_path / "pairs" / "summary.json")
    assert summary["kept"] == summary["prompts"] == 24
    assert summary["ledger"]["reasons"] == {"no assistant turn": 1}
    assert summary["ledger"]["read"] == 24 + 12 + 1
    with pytest.raises(UserError, match="needs rows of `question`"):
        stage.make_pairs(
            pairs_job(
                settings.model_copy(update={"keep": "wrong"}),
                tiny_model,
                tmp_path / "wrong",
            ),
            QUIET,
        )


def test_accepted_texts_are_whole_words() -> None:
    assert contains_accepted("The answer is 12.", ["12"])
    assert not contains_accepted("The answer is 123.", ["12"])
    assert contains_accepted("it is rome", ["Paris", "Rome"])
    assert first_sentence(" It is 3.5 km. Then more.\nAnd more.") == "It is 3.5 km."


def test_scores_equal_plain_transformers(tiny_model: Path, tmp_path: Path) -> None:
    questions = make_questions(tmp_path / "q.jsonl")
    pairs = make_pairs(tmp_path / "p.jsonl", count=10)
    evaluation = evaluate_models(
        evaluation_job(
            EvaluationSettings(
                questions=(DataSource(path=str(questions)),),
                pairs=(DataSource(path=str(pairs)),),
                max_new_tokens=8,
                samples=3,
            ),
            {"base": str(tiny_model), "sft": str(tiny_model)},
            tmp_path / "evaluation",
        ),
        QUIET,
    )
    assert evaluation == read_json(tmp_path / "evaluation" / "evaluation.json")
    assert evaluation["counts"] == {"questions": 12, "pairs": 10}
    assert len(evaluation["samples"]) == 3
    base = evaluation["models"]["base"]
    assert "completion_accuracy" in base
    model = load_model(tiny_model, dtype=torch.float64)
    tokenizer = load_tokenizer(tiny_model)
    resolve_template(tokenizer, None)
    rows = read_jsonl(questions)
    scored = [_logp(model, tokenizer, row["question"], row["answer"]) for row in rows]
    nats, tokens = (sum(column) for column in zip(*scored, strict=True))
    assert base["loss"] == pytest.approx(-nats / tokens, rel=1e-5)
    margins = []
    for row in read_jsonl(pairs):
        (chosen, n), (rejected, m) = (
            _logp(model, tokenizer, row["question"], row[key]) for key in ("chosen", "rejected")
        )
        margins.append(chosen / n - rejected / m)
    assert base["preference_margin"] == pytest.approx(sum(margins) / 10, rel=1e-4)
    assert base["preference_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 10)


def _logp(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, int]:
    """Sum of log-probs of answer and end token, and their number."""
    turn = {"role": "user", "content": question}
    prompt = tokenizer.apply_chat_template([turn], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([turn, {"role": "assistant", "content": answer}])[
        "input_ids"
    ]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    picked = logps[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    return float(picked.sum()), len(picked)


def test_stop_ids_and_prompts_come_from_the_template(tiny_model: Path) -> None:
    from tandem.data.records import Turn

    tokenizer = load_tokenizer(tiny_model)
    template = resolve_template(tokenizer, None)
    assert stop_ids(tokenizer, template) == [tokenizer.eos_token_id]
    text = tokenizer.decode(prompt_ids(tokenizer, template, (Turn("user", "say red"),)))
    assert text.endswith("### User:\nsay red</s>\n### Assistant:\n")
