"""Full fine-tuning against a plain loop over all weights in float64, on real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.data.batching.sampler import StepSampler
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import SftSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_jsonl
from tests.jobs import training_job

from . import ours, plain

BETA, DECAY, BATCH, STEPS = 0.3, 0.1, 3, 3
COMMON: dict[str, Any] = {
    "full": True, "batch_size": BATCH, "max_steps": STEPS, "learning_rate": plain.RATE,
    "adam_epsilon": plain.EPSILON, "weight_decay": DECAY, "logging_steps": 1,
    "max_length": plain.CONTEXT,
}  # fmt: skip


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(
    request: pytest.FixtureRequest, stories_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The real tiny model; and with an output head of its own, which differs from the embedding."""
    if request.param == "tied":
        return stories_path
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = AutoModelForCausalLM.from_pretrained(stories_path)
    model.config.tie_word_embeddings = False
    head = model.get_input_embeddings().weight.detach() * 0.9
    model.set_output_embeddings(torch.nn.Linear(*head.T.shape, bias=False))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    for file in stories_path.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def train(model: Any, losses: Sequence[Callable[[], Tensor]]) -> None:
    """AdamW under a cosine, clipped to norm 1; biases and norms do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plain.RATE, eps=plain.EPSILON)
    schedule = plain.get_cosine_schedule_with_warmup(optimizer, 0, len(losses))
    for loss in losses:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def run(kind: str, base: Path, data: Path, folder: Path) -> Path:
    sources = (DataSource(path=str(data)),)
    settings = (
        SftSettings(data=sources, **COMMON)
        if kind == "sft"
        else DpoSettings(data=sources, beta=BETA, **COMMON)
    )
    options = {"chat_template": "neural-chat", "dtype": "float64", "seed": 5}
    job = training_job(settings, base, folder, tokens_per_microbatch=ours.BUDGET, **options)
    return (run_sft if kind == "sft" else run_dpo)(job, Console(quiet=True))


def checkpoint(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "trained.safetensors")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_weights_end_as_in_a_plain_loop(
    kind: str,
    base: Path,
    pairs: list[plain.Pair],
    pairs_file: Path,
    conversations: list[plain.Labelled],
    conversations_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain.keep_float64(monkeypatch)
    records: Sequence[Any] = conversations if kind == "sft" else pairs
    data = conversations_file if kind == "sft" else pairs_file
    folder = run(kind, base, data, tmp_path / kind)

    model = plain.load(base, torch.float64)
    reference = None
    if kind == "dpo":
        with torch.no_grad():
            reference = plain.pair_logps(model, pairs)
    taken: list[float] = []

    def loss(examples: tuple[int, ...]) -> Tensor:
        chosen = [records[i] for i in examples]
        if reference is None:
            tokens = sum(sum(one.trained) for one in chosen)
            value = -plain.padded_logps(model, chosen).sum() / tokens
        else:
            policy = plain.pair_logps(model, chosen)
            value = plain.dpo_loss(policy, reference[list(examples)], BETA)
        taken.append(value.item())
        return value

    steps = StepSampler(len(records), BATCH, seed=5).steps(0, STEPS)
    train(model, [partial(loss, step.examples) for step in steps])
    logged = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert logged == pytest.approx(taken, rel=1e-9)
    plain.assert_close_tensors(checkpoint(folder), dict(model.named_parameters()), 1e-9)
    # What is left is a model as transformers reads it, in the format that its base is stored in.
    left = AutoModelForCausalLM.from_pretrained(folder)
    assert left.dtype == torch.float32
    rounded = {name: p.float() for name, p in model.named_parameters()}
    plain.assert_close_tensors(dict(left.named_parameters()), rounded, 1e-6)
