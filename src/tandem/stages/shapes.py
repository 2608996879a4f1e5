"""The shapes that a run declares, on devices that compile a graph for each, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tandem.data.buckets import Buckets, declare_buckets, padding_share
from tandem.data.order import Part, steps, steps_per_epoch
from tandem.data.packing import pack
from tandem.data.trees import Trees
from tandem.errors import UserError
from tandem.recipe.training import Training
from tandem.train.device import Device
from tandem.train.runtime import Hpu, Runtime


def declared_shapes(
    trees: Trees,
    settings: Training,
    *,
    device: Device,
    runtime: Runtime,
    budget: int,
    seed: int,
    tell: Callable[[str], None],
    parts: Sequence[Part] = (),
    held_out: Trees | None = None,
) -> tuple[Buckets | None, int]:
    """What micro-batches are filled up to, None where shapes are free, and the token budget.

    The budget never exceeds the largest shape; where lengths were declared and no budget, the
    largest is the budget, since a smaller one would be filled up anyway. What filling up costs is
    told, counted over the records' real lengths in an epoch's order, as one process packs them.
    Held-out records fit into the shapes, too.

    Raises UserError for a record, or a budget, that exceeds the declared lengths.
    """
    if not device.static_shapes:
        if runtime.hpu != Hpu():
            tell(f"the recipe's hpu section does nothing on {device.kind}")
        return None, budget
    asked = runtime.hpu.buckets
    buckets = declare_buckets(
        asked, trees, budget=budget, max_length=settings.max_length, held_out=held_out
    )
    if asked != "auto":
        budget = _within(buckets.longest, runtime.tokens_per_microbatch)
    name = "pad_max" if asked == "max" else "buckets"
    share = padding_share(_rows(trees, settings.batch_size, seed, budget, parts), buckets)
    lengths = ", ".join(str(shape.rows) for shape in buckets.shapes)
    tell(f"{name}: {share:.0%} of the tokens fed are padding (micro-batches of {lengths} tokens)")
    return buckets, budget


def _within(longest: int, requested: int | Literal["auto"]) -> int:
    if requested == "auto":
        return longest
    if requested > longest:
        raise UserError(
            f"tokens_per_microbatch {requested} exceeds the largest of hpu.buckets, {longest}. "
            "Lower the one or raise the other."
        )
    return requested


def _rows(
    trees: Trees, batch_size: int, seed: int, budget: int, parts: Sequence[Part]
) -> list[int]:
    """Rows of each micro-batch of the first epoch."""
    fed = trees.fed.tolist()
    count = steps_per_epoch(len(trees), batch_size, parts)
    found: list[int] = []
    for step in steps(len(trees), batch_size, seed=seed, count=count, parts=parts):
        tokens = [fed[i] for i in step.examples]
        found += [sum(tokens[i] for i in members) for members in pack(tokens, budget)]
    return found
