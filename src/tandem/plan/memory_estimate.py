"""Memory of each process, and disk: what the parts take, by engine."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.plan.model_shape import ModelShape
from tandem.recipe.choices import SHARDS

# Adapters, their gradients and AdamW's moments are float32.
_TRAINED_BYTES = 4
# nf4 with its blocks' scales, which are quantised as well.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Blocks of logits and their running sums, see `model.head`.
_HEAD_BLOCKS = 3


@dataclass(frozen=True)
class Held:
    """How a process of a stage holds things.

    Attributes:
        weight_bytes: of a frozen weight.
        quantized: whether the linear layers are in 4 bits.
        copies: bytes of copies of the frozen weights in a faster order (on CPU).
        checkpointing: whether activations are computed once more.
        tokens: of the largest micro-batch.
        activation_bytes: what a token keeps for the backward, without checkpointing.
        head_bytes: a block of logits, see `model.head`.
        baseline: what the process holds without a model (on CPU interpreter and libraries).
    """

    weight_bytes: int
    quantized: bool
    copies: int
    checkpointing: bool
    tokens: int
    activation_bytes: float
    head_bytes: int
    baseline: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: frozen ones, copies in a faster order included.
        adapter, gradients, optimizer: of what is trained.
        activations: of the largest micro-batch.
        head: the output head's blocks.
        baseline: the process without a model.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    baseline: int

    @property
    def peak(self) -> int:
        """All at once."""
        return (
            self.weights + self.adapter + self.gradients + self.optimizer
            + self.activations + self.head + self.baseline
        )  # fmt: skip


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the adapter's file, all checkpoints that are kept, and the merged model."""

    adapter: int
    checkpoints: int
    kept: int
    merged: int


def memory_of(shape: ModelShape, held: Held, engine: str, processes: int) -> Memory:
    """What one process holds under an engine.

    Args:
        shape: of the model with its adapter.
        held: how.
        engine: what it shards is spread; weights are gathered a layer at a time.
        processes: how many there are.
    """
    sharded = "weights" in SHARDS[engine]
    per_parameter = held.weight_bytes
    frozen = float(shape.parameters * per_parameter)
    if held.quantized:
        frozen -= shape.in_linear * (per_parameter - _NF4_BYTES)
    weights = frozen + (0 if sharded else held.copies)
    if sharded and processes > 1:
        weights = frozen / processes + 2 * shape.largest_layer * per_parameter
    trained = shape.trained * _TRAINED_BYTES
    share = processes if "gradients" in SHARDS[engine] else 1
    return Memory(
        weights=int(weights),
        adapter=trained // (processes if sharded else 1),
        gradients=trained // share,
        optimizer=2 * trained // share,
        activations=int(held.tokens * _per_token(shape, held)),
        head=held.head_bytes * _HEAD_BLOCKS + held.tokens * shape.hidden * (4 + held.weight_bytes),
        baseline=held.baseline,
    )


def disk_of(
    shape: ModelShape, *, steps: int, save_steps: int, keep: int | None, merged_bytes: int
) -> Disk:
    """What a stage and its merge leave on disk.

    Args:
        shape: of the model with its adapter.
        steps: optimizer steps of the stage.
        save_steps: a checkpoint every so many, and at the end.
        keep: how many checkpoints stay, None for all.
        merged_bytes: of a weight of the merged model.
    """
    adapter = shape.trained * _TRAINED_BYTES
    kept = -(-steps // save_steps)
    kept = kept if keep is None else min(kept, keep)
    return Disk(
        adapter=adapter,
        checkpoints=kept * 3 * adapter,
        kept=kept,
        merged=shape.parameters * merged_bytes,
    )


def _per_token(shape: ModelShape, held: Held) -> float:
    if not held.checkpointing:
        return held.activation_bytes
    # Each layer's input stays, and one layer at a time is there whole.
    return shape.layers * shape.hidden * held.weight_bytes + held.activation_bytes / shape.layers
