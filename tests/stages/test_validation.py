"""Held-out records scored on the way, the best adapter kept, and sources mixed by weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.errors import TandemError, UserError
from tandem.model.load_model import load_adapter, load_model
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, ValidationSettings
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer
from tandem.train.callbacks.held_out_evaluation import HeldOutEvaluation
from tandem.train.step import StepRunner

from .made_inputs import WORDS, make_conversations, make_pairs
from .test_training_stages import distance, run

STEADY = ("step", "loss", "grad_norm", "learning_rate")
TWO = ValidationSettings(fraction=0.2, steps=2)


def lines(folder: Path, name: str = "validation.jsonl") -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if "second" not in k and k != "memory_bytes"}
        for line in read_jsonl(folder / name)
    ]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def own_data(kind: str, path: Path) -> ValidationSettings:
    (make_conversations if kind == "sft" else make_pairs)(path, count=9)
    return ValidationSettings(data=(DataSource(path=str(path)),), steps=2)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_scoring_changes_nothing_in_training(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    plain = run(kind, tiny_model, tmp_path / "plain")
    scored = run(
        kind, tiny_model, tmp_path / "scored", validation=own_data(kind, tmp_path / "v.jsonl")
    )
    assert same(scored, plain)
    metrics = [
        [{k: line[k] for k in STEADY} for line in lines(tmp_path / name, "metrics.jsonl")]
        for name in ("plain", "scored")
    ]
    assert metrics[0] == metrics[1]
    found = lines(tmp_path / "scored")
    assert [line["step"] for line in found] == [0, 2, 4]
    assert found[-1]["eval_loss"] < found[0]["eval_loss"]
    if kind == "dpo":
        assert found[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert found[-1]["eval_rewards/margins"] > 0
    summary = read_json(tmp_path / "scored" / "summary.json")
    assert summary["validation"]["records"] == 9
    assert summary["validation"]["ledger"]["trained"] == 9
    assert summary["validation"]["last"]["step"] == summary["kept_step"] == 4
    assert "validation.jsonl" in read_json(tmp_path / "scored" / "manifest.json")["outputs"]


@pytest.mark.parametrize(("kind", "budget"), [("sft", 40), ("dpo", 4096)])
def test_the_scores_are_those_of_plain_float64(
    kind: str, budget: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Padded rows, full logits and float64: nothing of tandem's but the data and the adapter."""
    out = tmp_path / "out"
    validation = own_data(kind, tmp_path / "v.jsonl")
    run(kind, tiny_model, out, budget=budget, validation=validation, max_length=200, max_steps=2)
    base = load_model(tiny_model, dtype=torch.float64, device=torch.device("cpu"))
    reference = [logps(base, *row) for row in encoded(kind, tmp_path / "v.jsonl", out)]
    model = load_adapter(base, out)
    policy = [logps(model, *row) for row in encoded(kind, tmp_path / "v.jsonl", out)]
    found = lines(out)[-1]
    if kind == "sft":
        tokens = sum(count for _, count in policy)
        assert found["eval_loss"] == pytest.approx(-sum(p for p, _ in policy) / tokens, rel=2e-6)
        return
    gain = [0.1 * (p - r) for (p, _), (r, _) in zip(policy, reference, strict=True)]
    margins = [c - r for c, r in zip(gain[::2], gain[1::2], strict=True)]
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
    assert found["eval_loss"] == pytest.approx(loss, rel=2e-5)
    assert found["eval_rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert found["eval_rewards/accuracies"] == sum(m > 0 for m in margins) / len(margins)
    assert found["eval_rewards/chosen"] == pytest.approx(sum(gain[::2]) / len(margins), rel=1e-4)


def encoded(kind: str, path: Path, folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Ids and trained positions of each sequence, by the tokenizer and template that were saved."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = []
    for row in read_jsonl(path):
        if kind == "sft":
            roles = {"human": "user", "gpt": "assistant"}
            talks = [[{"role": roles[t["from"]], "content": t["value"]}
                      for t in row["conversations"]]]  # fmt: skip
        else:
            ask = {"role": "user", "content": row["question"]}
            talks = [[ask, {"role": "assistant", "content": row[name]}]
                     for name in ("chosen", "rejected")]  # fmt: skip
        for talk in talks:
            ids: list[int] = []
            trained: list[bool] = []
            for at in range(0, len(talk), 2):
                asked = _ids(tokenizer, talk[: at + 1], True)
                answered = _ids(tokenizer, talk[: at + 2], False)
                end = len(answered) - answered[::-1].index(tokenizer.eos_token_id)
                trained += [False] * (len(asked) - len(ids)) + [True] * (end - len(asked))
                ids = answered[:end]
            found.append((ids, trained))
    return found


def _ids(tokenizer: Any, talk: list[dict[str, str]], ask: bool) -> list[int]:
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def logps(model: Any, ids: list[int], trained: list[bool]) -> tuple[float, int]:
    padded = torch.tensor([[*ids, 0, 0, 0]])
    mask = torch.tensor([[1] * len(ids) + [0] * 3])
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits[0].double().log_softmax(-1)
    picked = [float(logits[i - 1, ids[i]]) for i in range(1, len(ids)) if trained[i]]
    return sum(picked), len(picked)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_fraction_is_held_out_by_prompt_and_accounted_for(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[Any] = []
    scored: list[Any] = []
    plain = StepRunner.run

    def watch(self: Any, step: Any) -> Any:
        rows = (self.examples[i].origin.row for i in step.examples)
        (trained_on if self.learns else scored).extend(rows)
        return plain(self, step)

    monkeypatch.setattr(StepRunner, "run", watch)
    run(kind, tiny_model, tmp_path / "out", validation=TWO)
    counts = read_json(tmp_path / "out" / "summary.json")["ledger"]
    assert counts["read"] == counts["trained"] + counts["held_out"] + counts["dropped"] == 24
    assert counts["held_out"] in (4, 5)
    assert len(set(scored)) == counts["held_out"]
    assert len(scored) == 3 * counts["held_out"]
    assert not set(trained_on) & set(scored)
    rows = [json.dumps(row.get("question") or row["conversations"][0])
            for row in read_jsonl(tmp_path / f"{kind}.jsonl")]  # fmt: skip
    assert not {rows[i - 1] for i in trained_on} & {rows[i - 1] for i in scored}


def test_a_split_is_held_out_and_shared_prompts_are_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make_conversations(data / "train.jsonl", 24)
    make_conversations(data / "test.jsonl", 4)
    said: list[str] = []
    monkeypatch.setattr(
        "tandem.stages.training.training_data.log", lambda _, text, **__: said.append(text)
    )
    run(
        "sft", tiny_model, tmp_path / "out",
        data=(DataSource(path=str(data)),), validation=ValidationSettings(split="test"),
    )  # fmt: skip
    line = "sft: 4 of 4 held-out records have a prompt that 12 training records have too"
    assert any(text.startswith(line) for text in said)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["validation"]["shared_prompts"] == 4
    assert any("held-out records have a prompt" in text for text in summary["warnings"])
    make_conversations(data / "test.jsonl", 5)
    with pytest.raises(UserError, match="held_out"):
        run(
            "sft", tiny_model, tmp_path / "out",
            data=(DataSource(path=str(data)),), validation=ValidationSettings(split="test"),
        )  # fmt: skip


WILD = {"learning_rate": 0.01, "max_steps": 8, "keep": "best", "lr_scheduler": "constant"}


def unlike(folder: Path) -> ValidationSettings:
    """Held-out answers unlike those that are trained on: their loss falls, and rises in the end."""
    rows = [
        [{"from": "human", "value": f"say {word}"}, {"from": "gpt", "value": "xyz"}]
        for word in WORDS[:5]
    ]
    path = folder / "unlike.jsonl"
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return ValidationSettings(data=(DataSource(path=str(path)),), steps=2)


def test_the_best_adapter_becomes_the_stages(tiny_model: Path, tmp_path: Path) -> None:
    held = unlike(tmp_path)
    last = run("sft", tiny_model, tmp_path / "last", validation=held, **(WILD | {"keep": "last"}))
    best = run("sft", tiny_model, tmp_path / "best", validation=held, **WILD)
    scores = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "best")}
    assert scores == {line["step"]: line["eval_loss"] for line in lines(tmp_path / "last")}
    step = min(scores, key=lambda s: (scores[s], s))
    assert step == 4
    summary = read_json(tmp_path / "best" / "summary.json")
    assert summary["kept_step"] == step
    assert summary["best_metric"] == "loss"
    assert read_json(tmp_path / "last" / "summary.json")["kept_step"] == 8
    from safetensors.torch import load_file

    at_step = tmp_path / "last" / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors"
    assert same(best, load_file(at_step))
    assert not same(best, last)
    assert not (tmp_path / "best" / "best").exists()
    assert (tmp_path / "best" / "adapter_config.json").exists()


@pytest.mark.parametrize("crash_after", [1, 3, 4, 7])
def test_an_interrupted_run_keeps_the_same_best(
    crash_after: int, tiny_model: Path, tmp_path: Path, best_of_a_whole_run: Any
) -> None:
    """Killed after any step, before and after the best one, with few checkpoints left."""
    whole, scores, kept = best_of_a_whole_run
    few: dict[str, Any] = {
        "validation": unlike(tmp_path),
        "save_steps": 3,
        "save_total_limit": 1,
        **WILD,
    }
    plain, taken = trainer.Trainer._take, 0

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        taken += 1
        if taken > crash_after:
            raise ZeroDivisionError
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(ZeroDivisionError):
            run("sft", tiny_model, tmp_path / "out", **few)
    found = run("sft", tiny_model, tmp_path / "out", **few)
    assert same(found, whole)
    assert lines(tmp_path / "out") == scores
    assert read_json(tmp_path / "out" / "summary.json")["kept_step"] == kept


@pytest.fixture(scope="module")
def best_of_a_whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        whole = run("sft", tiny_model, folder / "out", validation=unlike(folder), **WILD)
    return whole, lines(folder / "out"), read_json(folder / "out" / "summary.json")["kept_step"]


def test_a_later_best_that_no_checkpoint_knows_replaces_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The older best stays until a checkpoint knows of the newer one."""
    listed: list[list[str]] = []
    plain = HeldOutEvaluation.on_checkpoint
    best = tmp_path / "out" / "best"

    def on_checkpoint(self: Any, training: Any) -> None:
        listed.append(sorted(path.name for path in best.iterdir()))
        plain(self, training)
        listed.append(sorted(path.name for path in best.iterdir()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutEvaluation, "on_checkpoint", on_checkpoint)
        run(
            "sft", tiny_model, tmp_path / "out",
            validation=ValidationSettings(fraction=0.2, steps=1), keep="best", max_steps=6,
            save_steps=3, save_total_limit=1, learning_rate=1e-3,
        )  # fmt: skip
    assert listed == [
        ["step-000000", "step-000001", "step-000002", "step-000003"], ["step-000003"],
        ["step-000003", "step-000004", "step-000005", "step-000006"], ["step-000006"],
    ]  # fmt: skip


def test_training_that_only_harms_says_so(tiny_model: Path, tmp_path: Path) -> None:
    """What is held out are the records that are trained on, with chosen and rejected exchanged."""
    run("dpo", tiny_model, tmp_path / "first", max_steps=1)
    swapped = tmp_path / "swapped.jsonl"
    rows = read_jsonl(tmp_path / "dpo.jsonl")
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    swapped.write_text("".join(json.dumps(row) + "\n" for row in rows))
    against = ValidationSettings(data=(DataSource(path=str(swapped)),), steps=2)
    run("dpo", tiny_model, tmp_path / "out", validation=against, keep="best")
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["kept_step"] == 0
    assert any("no score after training is better" in text for text in summary["warnings"])


@pytest.mark.parametrize("metric", ["accuracy", "margin"])
def test_dpo_keeps_the_best_by_other_metrics(metric: str, tiny_model: Path, tmp_path: Path) -> None:
    run("dpo", tiny_model, tmp_path / "out", validation=TWO, keep="best", best_metric=metric)
    name = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}[metric]
    scores = {line["step"]: line[name] for line in lines(tmp_path / "out")}
    kept = read_json(tmp_path / "out" / "summary.json")["kept_step"]
    assert kept == min(scores, key=lambda step: (-scores[step], step))


def test_a_held_out_loss_that_is_no_number_says_what_to_do(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.train.engines.engine import Engine

    plain = Engine.score

    def score(self: Engine, batch: Any) -> Tensor:
        return plain(self, batch) * (1.0 if torch.is_grad_enabled() else float("nan"))

    monkeypatch.setattr(Engine, "score", score)
    with pytest.raises(TandemError, match=r"held-out records is not finite after 0 steps.*row"):
        run("sft", tiny_model, tmp_path / "out", validation=TWO)


def mixed(tmp_path: Path, kind: str, weight: float) -> tuple[DataSource, ...]:
    make = make_conversations if kind == "sft" else make_pairs
    make(tmp_path / "a.jsonl", 6)
    make(tmp_path / "b.jsonl", 9)
    return (
        DataSource(path=str(tmp_path / "a.jsonl"), weight=weight),
        DataSource(path=str(tmp_path / "b.jsonl")),
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_record_shown_twice_counts_twice(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """One step of all records is one over a file that has the weighted ones twice."""
    once: dict[str, Any] = {
        "batch_size": 100,
        "max_steps": 1,
        "lora": LoraSettings(rank=4, alpha=8),
    }
    data = mixed(tmp_path, kind, 2.0)
    weighted = run(kind, tiny_model, tmp_path / "weighted", data=data, **once)
    copied = tmp_path / "copied.jsonl"
    a, b = ((tmp_path / name).read_text() for name in ("a.jsonl", "b.jsonl"))
    copied.write_text(a + a + b)
    written = run(kind, tiny_model, tmp_path / "out", data=(DataSource(path=str(copied)),), **once)
    plain = run(kind, tiny_model, tmp_path / "plain", data=mixed(tmp_path, kind, 1.0), **once)
    assert distance(weighted, written) < 5e-5
    assert distance(weighted, plain) > 1e-3
    line = lines(tmp_path / "weighted", "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(
        lines(tmp_path / "out", "metrics.jsonl")[0]["loss"], rel=1e-6
    )
    assert line["examples"] == 21
    shares = read_json(tmp_path / "weighted" / "summary.json")["mixture"]
    assert [(fact["records"], fact["weight"], fact["shown"]) for fact in shares] == [
        (6, 2.0, 12), (9, 1.0, 9),
    ]  # fmt: skip
    assert shares[0]["share"] == pytest.approx(12 / 21)


def test_a_weighted_run_goes_on_bit_for_bit_under_any_budget(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(tmp_path, "sft", 2.5)
    whole = run("sft", tiny_model, tmp_path / "whole", data=data, max_steps=6)
    small = run("sft", tiny_model, tmp_path / "small", data=data, budget=1, max_steps=6)
    # Dropout is on: masks of copies do not depend on who shares their micro-batch.
    assert distance(small, whole) < 5e-5
    plain, taken, rows = trainer.Trainer._take, 0, Counter[int]()

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        rows.update(step.examples)
        taken += 1
        if taken == 5:  # an epoch
            raise ZeroDivisionError
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(ZeroDivisionError):
            run("sft", tiny_model, tmp_path / "stopped", data=data, max_steps=6)
    assert sum(rows.values()) == 24  # an epoch: 15 of a, 9 of b
    assert all(rows[i] in (2, 3) for i in range(6))
    assert all(rows[i] == 1 for i in range(6, 15))
    resumed = run("sft", tiny_model, tmp_path / "stopped", data=data, max_steps=6)
    assert same(resumed, whole)
    with pytest.raises(UserError, match=r"data\.0\.weight|weight"):
        run("sft", tiny_model, tmp_path / "whole", data=mixed(tmp_path, "sft", 3.0), max_steps=6)


def test_the_mixture_is_said_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "tandem.stages.training.training_data.log", lambda _, text, **__: said.append(text)
    )
    data = mixed(tmp_path, "sft", 0.5)
    run("sft", tiny_model, tmp_path / "out", data=data, max_steps=1)
    (line,) = (text for text in said if "an epoch shows" in text)
    assert line == (
        f"sft: an epoch shows 12 records: 25.0% {tmp_path / 'a.jsonl'} (6 records, weight 0.5), "
        f"75.0% {tmp_path / 'b.jsonl'} (9 records, weight 1)"
    )
