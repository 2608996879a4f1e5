"""tandem's own pieces, put together as its training loop does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.data.batching.collate import collate
from tandem.data.batching.packing import pack
from tandem.data.encoded.example import Example
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import resolve_template
from tandem.integrations.choose import choose_device, choose_engine
from tandem.model.load_model import load_model
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import FOR_TRAINING, Preparation, prepare_model
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings
from tandem.runtime.launch import Launch
from tandem.runtime.process_group import ProcessGroup
from tandem.train.engines.engine import Engine
from tandem.train.engines.replicated import ReplicatedEngine
from tandem.train.objectives.objective import Objective

from .plain import ALPHA, RANK

# Small enough for several micro-batches a step, some of them with several trees.
BUDGET = 700


def trees_of(prepare: Any, path: Path, tokenizer: Any) -> list[Example]:
    """Records through the public path of data; every row must come out whole."""
    ledger = Ledger(None)
    trees: list[Example] = prepare(
        [DataSource(path=str(path))],
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, "neural-chat"),
        max_length=512,
        ledger=ledger,
    )
    assert ledger.summary()["truncated"] == ledger.summary()["dropped"] == 0
    return trees


def adapted(folder: Path, dtype: torch.dtype = torch.float32, backend: str = "segments") -> Any:
    """The model with tandem's attention and adapter."""
    weights = LoraWeights(LoraSettings(rank=RANK, alpha=ALPHA), seed=1, base="base")
    preparation = Preparation(attention=backend, weights=weights)
    return prepare_model(load_model(folder, dtype=dtype), FOR_TRAINING, preparation)


def engine_of(model: Any, of_token: Callable[[Tensor], Tensor] | None = None) -> Engine:
    """An engine on the CPU that holds the model; `of_token` is as in `Engine.prepare`."""
    device = choose_device("cpu", str(model.dtype).removeprefix("torch."))
    engine = choose_engine("single", device, ProcessGroup(Launch()))
    engine.prepare(model, lambda parameters: torch.optim.SGD(parameters.values()), None, of_token)
    return engine


def micro_batches(trees: Sequence[Example]) -> list[tuple[int, ...]]:
    """The step's plan; more than one micro-batch, or a test of accumulation tests nothing."""
    plan = pack([tree.fed for tree in trees], BUDGET)
    assert len(plan) > 1
    assert max(len(members) for members in plan) > 1
    return plan


def scores(engine: Engine, trees: Sequence[Example]) -> Tensor:
    """Log-probs [n, B] of every tree's branches, without gradients."""
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for members in micro_batches(trees):
            logps = engine.score(collate([trees[i] for i in members])).view(len(members), -1)
            rows.update(zip(members, logps, strict=True))
    return torch.stack([rows[i] for i in range(len(trees))])


def accumulate(
    engine: Engine,
    trees: Sequence[Example],
    objective: Objective,
    observed: Sequence[Example] | None = None,
) -> dict[str, float]:
    """Forward and backward of one step over all trees; returns the objective's metrics."""
    denominator = objective.begin(trees, range(len(trees)))
    sums: dict[str, float] = {"count": denominator}
    if objective.couples:
        objective.see_step(scores(engine, observed or trees).flatten())
    for members in micro_batches(trees):
        logps = engine.score(collate([trees[i] for i in members]))
        part = objective.loss(logps, torch.ones_like(logps), members, first_step=False)
        engine.backward(part.loss / denominator, last=False)
        for name, value in part.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert isinstance(engine, ReplicatedEngine)
    for parameter, gradient in zip(engine.parameters.values(), engine.gradients.views, strict=True):
        parameter.grad = gradient
    return objective.metrics(sums)
