"""SFT against transformers' own loss and a plain loop, on real conversations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.data.batching.sampler import StepSampler
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_jsonl
from tandem.train.objectives.supervised import SupervisedObjective, probability_weighted
from tests.jobs import training_job

from ..data.built import prepare_conversations
from . import ours, plain


def test_token_ids_and_masks_equal_plain_templating(
    conversations: list[plain.Labelled], conversations_file: Path, chat_tokenizer: Any
) -> None:
    trees = ours.trees_of(prepare_conversations, conversations_file, chat_tokenizer)
    answers = [sum(a and not b for a, b in _steps(c.trained)) for c in conversations]
    assert max(answers) > 1, "no conversation has several trained answers"
    for tree, conversation in zip(trees, conversations, strict=True):
        sequence = tree.sequence(0)
        assert sequence.input_ids.tolist() == conversation.ids
        assert sequence.trained.tolist() == conversation.trained


def test_rows_of_tokens_are_the_same_examples_and_trls(
    conversations: list[plain.Labelled],
    conversations_file: Path,
    chat_tokenizer: Any,
    stories_path: Path,
    tmp_path: Path,
) -> None:
    """Rows of ids and labels are trained by both as the conversations are; DFT is the same, too."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = [
        {
            "input_ids": one.ids,
            "labels": [i if t else -100 for i, t in zip(one.ids, one.trained, strict=True)],
        }
        for one in conversations
    ]
    file = plain.write_rows(tmp_path / "rows.jsonl", rows)
    found = ours.trees_of(prepare_conversations, file, chat_tokenizer)
    expected = ours.trees_of(prepare_conversations, conversations_file, chat_tokenizer)
    peer = plain.fresh_adapter(plain.load(stories_path), seed=1)
    plain.move_adapter(peer)
    trainer = SFTTrainer(
        model=peer,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none",
            loss_type="dft",
            disable_tqdm=True, activation_checkpointing=False, max_length=plain.CONTEXT,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=chat_tokenizer,
    )  # fmt: skip
    fed = trainer.data_collator(list(trainer.train_dataset))
    for number, (tree, other) in enumerate(zip(found, expected, strict=True)):
        sequence = tree.sequence(0)
        assert len(tree.branches) == 1
        assert sequence.input_ids.tolist() == other.sequence(0).input_ids.tolist()
        assert sequence.trained.tolist() == other.sequence(0).trained.tolist()
        size = len(sequence.input_ids)
        assert fed["input_ids"][number, :size].tolist() == sequence.input_ids.tolist()
        targets = fed["labels"][number] != -100
        assert targets[:size].tolist() == sequence.trained.tolist()
        assert not targets[size:].any()

    loss = trainer.compute_loss(trainer.model, dict(fed))
    loss.backward()
    model = ours.adapted(stories_path)
    plain.move_adapter(model)
    engine = ours.engine_of(model, probability_weighted)
    model.train()
    metrics = ours.accumulate(engine, found, SupervisedObjective())
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    plain.assert_close_tensors(plain.gradients(model), plain.gradients(peer), 5e-5)


def test_loss_and_gradients_equal_transformers(
    conversations: list[plain.Labelled],
    conversations_file: Path,
    chat_tokenizer: Any,
    stories_path: Path,
) -> None:
    peer = plain.fresh_adapter(plain.load(stories_path), seed=1)
    plain.move_adapter(peer)
    loss = plain.padded_supervised_loss(peer, conversations)
    loss.backward()

    model = ours.adapted(stories_path)
    plain.move_adapter(model)
    trees = ours.trees_of(prepare_conversations, conversations_file, chat_tokenizer)
    metrics = ours.accumulate(ours.engine_of(model), trees, SupervisedObjective())

    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    plain.assert_close_tensors(plain.gradients(model), plain.gradients(peer), 1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 5e-5), ("float64", 1e-9)])
def test_a_short_run_equals_a_plain_loop(
    dtype: str,
    limit: float,
    conversations: list[plain.Labelled],
    conversations_file: Path,
    stories_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain.keep_float64(monkeypatch)
    settings = SftSettings(
        data=(DataSource(path=str(conversations_file)),),
        batch_size=3,
        max_steps=3,
        learning_rate=plain.RATE,
        adam_epsilon=plain.EPSILON,
        logging_steps=1,
        max_length=plain.CONTEXT,
        lora=LoraSettings(rank=plain.RANK, alpha=plain.ALPHA, target_modules="all-linear"),
    )
    folder = run_sft(
        training_job(
            settings,
            stories_path,
            tmp_path / "sft",
            chat_template="neural-chat",
            seed=5,
            dtype=dtype,
            tokens_per_microbatch=ours.BUDGET,
        ),
        Console(quiet=True),
    )

    model = plain.fresh_adapter(plain.load(stories_path, getattr(torch, dtype)), seed=5)
    taken: list[float] = []

    def loss(examples: tuple[int, ...]) -> Tensor:
        chosen = [conversations[i] for i in examples]
        tokens = sum(sum(c.trained) for c in chosen)
        value = -plain.padded_logps(model, chosen).sum() / tokens
        taken.append(value.item())
        return value

    steps = StepSampler(len(conversations), 3, seed=5).steps(0, 3)
    plain.train(model, [partial(loss, step.examples) for step in steps])
    logged = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert logged == pytest.approx(taken, rel=max(1e-9, limit / 10))
    trained = load_file(folder / "adapter_model.safetensors")
    plain.assert_close_tensors(trained, plain.trained_parameters(model), limit)


def _steps(mask: list[bool]) -> list[tuple[bool, bool]]:
    return list(zip(mask, [False, *mask[:-1]], strict=True))
