"""A small model of a recipe's shape, tried on a few micro-batches to know how fast it trains.

Of a large model, products take nearly all the time. A small one spends most of it elsewhere: in
attention, norms and the adapter's narrow products, and in calling all of them.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tandem.data.batching.collate import collate, record_key
from tandem.data.batching.sampler import StepSampler
from tandem.data.encoded.dataset import EncodedDataset, to_arrays
from tandem.data.encoded.dataset_store import DatasetWriter
from tandem.data.encoded.encode_chunk import EncodedChunk
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.model.added_tokens import make_rows
from tandem.model.attention.select import choose_backend
from tandem.model.logprobs.sequence_logps import micro_batches, sequence_logps
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import (
    AFTER_LOADING,
    FOR_TRAINING,
    Preparation,
    prepare_model,
)
from tandem.model.trained_weights import trainable_parameters
from tandem.plan.model_shape import ModelShape
from tandem.plan.rate import Rate
from tandem.plan.workload import Asked, count_operations, count_work
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device, exact_float32

# Parameters of the largest model that is made for it.
_LARGEST = 50_000_000
# When no further pass is begun.
_SECONDS = 1.0
# Records of a guess that are made up.
_MADE_UP = 64


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        config: the model's configuration; its weights are random ones.
        shape: of the model with its adapter.
        settings: of the stage.
        device: where.
        attention: what the recipe asks for.
        dropout: whether the stage has any.
        copies: bytes of copies of the weights in a faster order that the run would keep.
        added: tokens whose embeddings are trained.
        trains_added: whether the adapter trains their rows.
    """

    config: Any
    shape: ModelShape
    settings: TrainingSettings
    device: Device
    attention: str
    dropout: bool
    copies: int
    added: AddedTokens
    trains_added: bool

    def rate(self, trees: EncodedDataset, asked: Asked, *, most: float) -> Rate | None:
        """The rate of one process over its first step's micro-batches, as many as a second holds.

        None for models and micro-batches that are too large, and for devices that compile a graph
        for every shape.

        Args:
            trees: the stage's records.
            asked: how it goes through them.
            most: operations of a micro-batch that is tried: a pass cannot be cut short.
        """
        if self.shape.parameters > _LARGEST or not self.device.free_shapes:
            return None
        model = self._model()
        sampler = StepSampler(len(trees), asked.batch_size, asked.seed, asked.parts)
        (first,) = sampler.steps(0, 1)
        examples = np.asarray(first.examples, dtype=np.int64)
        groups = micro_batches(model, [trees[i] for i in first.examples], asked.budget)
        operations = seconds = spent = 0.0
        for number, group in enumerate(groups):
            members = np.sort(examples[list(group)])
            counted = self._operations(trees, members, asked)
            if counted > most or spent > _SECONDS:
                break
            # The fastest: whatever else the machine does, or what is only done once, is no part.
            taken: list[float] = []
            while len(taken) < (2 if number else 3) and spent <= _SECONDS:
                taken.append(self._take(model, trees, members))
                spent += taken[-1]
            seconds += min(taken)
            operations += counted
        if not operations:
            return None
        basis = "a trial of a model of this shape with random weights"
        return Rate(operations / max(seconds, 1e-9), None, basis)

    def _model(self) -> Any:
        """Made and adapted as a run does it."""
        exact_float32()
        device, settings = self.device, self.settings
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(self.config), dtype=device.weights
        )
        model = prepare_model(model.eval(), AFTER_LOADING, Preparation(device=device.torch_device))
        backend, _ = choose_backend(self.attention, model)
        if not self.trains_added:
            make_rows(model, self.added)
        preparation = Preparation(
            attention=backend,
            weights=LoraWeights(settings.lora, dropout=self.dropout),
            recomputed=settings.gradient_checkpointing,
            reordered=bool(self.copies),
            added=self.added if self.trains_added else None,
        )
        model = prepare_model(model, FOR_TRAINING, preparation)
        model.train()
        return model

    def _take(self, model: Any, trees: EncodedDataset, members: NDArray[np.int64]) -> float:
        """Seconds of one micro-batch, forward and backward."""
        device = self.device
        keys = [record_key(0, 0, int(i)) for i in members] if self._drops else None
        autocast = device.autocast
        device.synchronize()
        began = time.perf_counter()
        batch = collate([trees[int(i)] for i in members], keys).to(device.torch_device)
        with torch.autocast(device.kind, autocast, enabled=autocast is not None):
            loss = sequence_logps(model, batch, device.sums).sum()
        torch.autograd.grad(loss, list(trainable_parameters(model).values()), allow_unused=True)
        device.synchronize()
        return time.perf_counter() - began

    @property
    def _drops(self) -> bool:
        return self.dropout and self.settings.lora.dropout > 0

    def _operations(self, trees: EncodedDataset, members: NDArray[np.int64], asked: Asked) -> float:
        """Of one micro-batch, in which a record counts as often as it is there."""
        records, times = np.unique(members, return_counts=True)
        checkpointing = self.settings.gradient_checkpointing
        found = 0.0
        for showing in range(times.max()):
            shown = records[times > showing]
            once = replace(
                asked, batch_size=len(shown), epochs=1.0, max_steps=None, processes=1, parts=()
            )
            work = count_work(trees.select(shown), once)
            found += count_operations(
                self.shape, work, reference=False, checkpointing=checkpointing
            ).training
        return found


def made_up(records: int, tokens: int, answers: float, vocabulary: int) -> EncodedDataset:
    """A few of the records that a guess says there are.

    Args:
        records: how many there are.
        tokens: of each.
        answers: share of the tokens that is trained.
        vocabulary: how many tokens there are to choose from.
    """
    ids = (np.arange(tokens) % vocabulary).astype(np.int32)
    trained = np.arange(tokens) >= round(tokens * (1 - answers))
    nothing = Branch(ids[:0], trained[:0])
    count = min(records, _MADE_UP)
    writer = DatasetWriter(None, ["guessed"])
    trees = [
        Example(nothing, (Branch(ids, trained),), Origin("guessed", row + 1))
        for row in range(count)
    ]
    writer.add(EncodedChunk("guessed", to_arrays(trees), ()))
    writer.finish({}, [count])
    return writer.dataset()
