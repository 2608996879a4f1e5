"""What a training stage will take (memory by engine, disk, time), and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.batching.sampler import WeightedSource
from tandem.data.encoded.dataset import EncodedDataset
from tandem.model.cpu.onednn_linear import ordered_bytes
from tandem.model.logprobs.output_head import block_bytes
from tandem.plan.model_shape import ModelShape, shape_of
from tandem.plan.rate import FIGURES, Measured, Rate, RateKey, recorded_rate, remember
from tandem.plan.workload import Operations, Pacing, Workload, count_operations, count_work
from tandem.recipe.choices import SHARDS
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device
from tandem.train.optimizers import AVERAGING, OPTIMIZERS
from tandem.train.token_budget import activation_bytes, attention_weight

# Adapters, their gradients and the optimizer's tensors are float32.
_TRAINED_BYTES = 4
# nf4 with its blocks' scales, which are quantised as well.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Blocks of logits and their running sums, see `model.logprobs.output_head`.
_HEAD_BLOCKS = 3


@dataclass(frozen=True)
class MemoryUse:
    """How a process of a stage uses memory."""

    weight_bytes: int  # of a frozen weight
    quantized: bool  # whether the linear layers are in 4 bits
    copies: int  # bytes of copies of the frozen weights in a faster order (on CPU)
    checkpointing: bool  # whether activations are computed once more
    tokens: int  # of the largest micro-batch
    activation_bytes: float  # what a token keeps for the backward, without checkpointing
    head_bytes: int  # a block of logits, see `model.logprobs.output_head`
    baseline: int  # what the process holds without a model (on CPU interpreter and libraries)
    optimizer: str = "adamw"  # the recipe's name of it
    average: bool = False  # whether a moving average of what is trained is kept beside it


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int  # frozen ones, copies in a faster order included
    # of what is trained
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # of the largest micro-batch
    head: int  # the output head's blocks
    baseline: int  # the process without a model

    @property
    def peak(self) -> int:
        """All at once."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the adapter's file, all checkpoints that are kept, and the merged model."""

    adapter: int
    checkpoints: int
    kept: int
    merged: int


@dataclass(frozen=True)
class StageEstimate:
    """Estimates of one stage."""

    setting: RateKey
    work: Workload
    operations: Operations
    memory: Memory
    rate: Rate | None  # None where no run has shown one and none was timed
    seconds: float | None  # of training; None without a rate
    reference_seconds: float | None  # of DPO's pass before it
    reference_records: int  # records of that pass, or of both where there are two


def memory_of(shape: ModelShape, use: MemoryUse, engine: str, processes: int) -> Memory:
    """What one process holds under an engine.

    ZeRO-2 spreads gradients and the optimizer's tensors over the processes; ZeRO-3 and FSDP2 spread
    the weights as well, and gather a layer at a time.
    """
    sharded = "weights" in SHARDS[engine]
    frozen = 0.0 if shape.full else float(shape.parameters * use.weight_bytes)
    if use.quantized:
        frozen -= shape.in_linear * (use.weight_bytes - _NF4_BYTES)
    weights = frozen + (0 if sharded or shape.full else use.copies)
    if sharded and processes > 1:
        weights = frozen / processes + 2 * shape.largest_layer * use.weight_bytes
    per_token = use.activation_bytes + shape.decomposed * use.weight_bytes
    if use.checkpointing:
        # Each layer's input stays in memory, and all activations of one layer.
        per_token = shape.layers * shape.hidden * use.weight_bytes + per_token / shape.layers
    trained = shape.trained * _TRAINED_BYTES
    share = processes if SHARDS[engine] else 1
    of_process = trained // (processes if sharded else 1)
    # A micro-batch's gradients are whole before they are added to the step's.
    added = 0 if sharded or not shape.full else trained
    kept = shape.kept * _TRAINED_BYTES
    return Memory(
        weights=int(weights) + (of_process if shape.full else 0),
        adapter=(0 if shape.full else of_process) + use.average * of_process + kept,
        gradients=trained // share + added,
        optimizer=int(state_bytes(shape, use.optimizer)) // share,
        activations=int(use.tokens * per_token),
        head=use.head_bytes * _HEAD_BLOCKS + use.tokens * shape.hidden * (4 + use.weight_bytes),
        baseline=use.baseline,
    )


def state_bytes(shape: ModelShape, optimizer: str) -> float:
    """What an optimizer keeps for all that is trained."""
    spec = OPTIMIZERS[optimizer]
    edges = shape.edges if spec.factored else 0
    return (spec.state_tensors * shape.trained + edges) * _TRAINED_BYTES


def disk_of(
    shape: ModelShape,
    settings: TrainingSettings,
    *,
    steps: int,
    save_steps: int,
    merged_bytes: int,
) -> Disk:
    """What a stage and its merge leave on disk; `merged_bytes` of a weight of the merged model.

    A checkpoint is written every `save_steps` and at the end; `save_total_limit` of them stay.
    """
    keep = settings.save_total_limit
    trained = shape.trained * _TRAINED_BYTES
    adapter = trained + shape.kept * _TRAINED_BYTES
    left = shape.parameters * merged_bytes
    kept = -(-steps // save_steps)
    kept = kept if keep is None else min(kept, keep)
    # An adapter that is an average stands beside the weights that move.
    averaged = settings.optimizer in AVERAGING or settings.ema_decay is not None
    beside = adapter if averaged else 0
    checkpoint = adapter + beside + int(state_bytes(shape, settings.optimizer))
    return Disk(0 if shape.full else adapter, kept * checkpoint, kept, left)


@dataclass(frozen=True)
class StageSetup:
    """How a stage is run, as far as its estimates depend on it."""

    name: str  # sft or dpo
    settings: TrainingSettings
    device: Device
    processes: int
    engine: str
    config: Any  # of the model
    seed: int  # of the order of records
    budget: int  # tokens of a micro-batch
    padded: bool  # whether the model reads padded rows
    quantized: bool  # whether the base is in 4 bits
    baseline: int  # bytes that the process holds without a model

    def pacing(self, parts: tuple[WeightedSource, ...] = ()) -> Pacing:
        """How it goes through its records, whose weights are `parts`."""
        settings, weight = self.settings, attention_weight(self.config)
        return Pacing(
            settings.batch_size, settings.epochs, settings.max_steps, self.seed, self.budget,
            self.processes, weight, self.padded, parts,
        )  # fmt: skip

    def memory_use(self, work: Workload, copies: int) -> MemoryUse:
        """How a process uses memory; `copies`: bytes of weights in a faster order."""
        width = self.device.weights.itemsize
        vocabulary = int(self.config.get_text_config().vocab_size)
        return MemoryUse(
            weight_bytes=width,
            quantized=self.quantized,
            copies=copies,
            checkpointing=self.settings.gradient_checkpointing,
            tokens=work.largest,
            activation_bytes=activation_bytes(self.config) * width / 4,
            head_bytes=min(block_bytes(self.device.kind), work.largest * vocabulary * 4),
            baseline=self.baseline,
            optimizer=self.settings.optimizer,
            average=self.settings.ema_decay is not None,
        )

    def rate_key(self, shape: ModelShape) -> RateKey:
        """What its rate depends on."""
        device = self.device
        return RateKey(
            self.name, device.kind, device.dtype_name, shape.parameters, self.processes, self.engine
        )

    def estimate(
        self, shape: ModelShape, work: Workload, copies: int, rate: Rate | None
    ) -> StageEstimate:
        """The estimates that follow from the model's shape and the work."""
        again = self.settings.gradient_checkpointing
        passes, seen = 0, False
        if isinstance(self.settings, DpoSettings):
            passes, seen = self.settings.reference_passes, self.settings.sees_steps
        operations = count_operations(shape, work, reference=passes, checkpointing=again, seen=seen)
        memory = memory_of(shape, self.memory_use(work, copies), self.engine, self.processes)
        seconds = reference_seconds = None
        if rate is not None:
            last = rate.last_run
            # Processes on a CPU share the machine that was timed.
            alone = self.device.is_host and last is None
            together = rate.operations * (1 if alone else self.processes)
            seconds = operations.training * work.imbalance / together
            if last is not None and last.reference_seconds > 0:
                together = last.reference_operations / last.reference_seconds
            reference_seconds = operations.reference / together
        return StageEstimate(
            self.rate_key(shape), work, operations, memory, rate, seconds, reference_seconds,
            reference_records=passes * work.records,
        )  # fmt: skip


def estimate_run(
    setup: StageSetup, model: Any, dataset: EncodedDataset, parts: tuple[WeightedSource, ...]
) -> StageEstimate:
    """The estimates of a run about to begin; the records have the weights of `parts`."""
    shape = shape_of(model)
    work = count_work(dataset, setup.pacing(parts))
    # Nothing is timed here, where other processes wait.
    rate = recorded_rate(setup.rate_key(shape))
    return setup.estimate(shape, work, ordered_bytes(model), rate)


def copied_bytes(shape: ModelShape, *, quantized: bool) -> int:
    """What `onednn_linear.ordered_bytes` will find in a model; 4-bit layers have no copies."""
    return 2 * 4 * (shape.head + (0 if quantized else shape.plain))


def compare(estimate: StageEstimate, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates against what a finished stage's summary says, for that summary."""
    work = estimate.work
    estimated = (work.tokens, work.steps, estimate.memory.peak, estimate.seconds)
    keys = ("tokens", "steps", "peak_memory_bytes", "train_seconds")
    return {
        "rate_from": None if estimate.rate is None else estimate.rate.source,
        **{
            figure: {"estimated": value, "actual": summary[key]}
            for figure, value, key in zip(FIGURES, estimated, keys, strict=True)
        },
    }


def remember_run(
    estimate: StageEstimate, comparison: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    """Record a finished stage for the next plan; raises OSError where that cannot be."""
    figures = {name: comparison[name] for name in FIGURES}
    whole = summary["reference_computed"] == estimate.reference_records
    remember(
        Measured(
            estimate.setting,
            estimate.operations.training * estimate.work.imbalance,
            {k: v["estimated"] for k, v in figures.items() if v["estimated"] is not None},
            {k: v["actual"] for k, v in figures.items()},
            estimate.operations.reference if whole else 0.0,
            summary["reference_seconds"] if whole else 0.0,
        )
    )
