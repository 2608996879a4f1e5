"""Which examples make up each optimizer step: a function of seed, weights and batch size alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tandem.errors import UserError


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the epoch it lies in and its examples' indices.

    An index that an epoch shows several times may occur more than once.
    """

    number: int
    epoch: int
    examples: tuple[int, ...]

    @property
    def copies(self) -> list[int]:
        """Of each example, how often its index came before it in this step."""
        seen: Counter[int] = Counter()
        found = []
        for index in self.examples:
            found.append(seen[index])
            seen[index] += 1
        return found


@dataclass(frozen=True)
class WeightedSource:
    """Consecutive examples that an epoch shows `weight` times each."""

    examples: int
    weight: float = 1.0

    def shown(self, epochs: int) -> int:
        """How many of its examples the first `epochs` epochs show, repeated ones each time.

        Rounded up as a whole, so that no epoch's rounding adds to another's.
        """
        # The decimal that the recipe has, not its nearest binary fraction.
        return math.ceil(epochs * self.examples * Fraction(str(self.weight)))


def tenth(steps: int) -> int:
    """How many steps apart things happen that happen about ten times in so many."""
    return max(1, -(-steps // 10))


def total_steps(
    examples: int,
    batch_size: int,
    *,
    epochs: float | None = None,
    max_steps: int | None = None,
    parts: Sequence[WeightedSource] = (),
) -> int:
    """Number of optimizer steps; the last step of an epoch may be smaller than the others.

    `max_steps` wins over `epochs`; a fraction of an epoch rounds up to whole steps.
    """
    if examples < 1 or batch_size < 1:
        raise ValueError("examples and batch_size must be positive")
    if max_steps is not None:
        return max_steps
    wanted = 1.0 if epochs is None else epochs
    if not _weighted(parts):
        return math.ceil(wanted * steps_per_epoch(examples, batch_size))
    whole = math.floor(wanted)
    sizes = [steps_per_epoch(examples, batch_size, parts, epoch) for epoch in range(whole + 1)]
    return sum(sizes[:whole]) + math.ceil((wanted - whole) * sizes[whole])


def epoch_size(examples: int, parts: Sequence[WeightedSource] = (), epoch: int = 0) -> int:
    """How many examples an epoch shows, repeated ones each time."""
    if not _weighted(parts):
        return examples
    return sum(part.shown(epoch + 1) - part.shown(epoch) for part in parts)


def steps_per_epoch(
    examples: int, batch_size: int, parts: Sequence[WeightedSource] = (), epoch: int = 0
) -> int:
    """Optimizer steps of an epoch; by weights that are fractions, epochs may differ by a few."""
    return math.ceil(epoch_size(examples, parts, epoch) / batch_size)


def epochs_after(
    step: int, examples: int, batch_size: int, parts: Sequence[WeightedSource] = ()
) -> float:
    """How many epochs, the last one in part, lie before a step."""
    if not _weighted(parts):
        return step / steps_per_epoch(examples, batch_size)
    epoch, left = _locate(step, examples, batch_size, parts)
    return epoch + left / max(1, steps_per_epoch(examples, batch_size, parts, epoch))


def steps(
    examples: int,
    batch_size: int,
    *,
    seed: int,
    count: int,
    start: int = 0,
    parts: Sequence[WeightedSource] = (),
) -> Iterator[Step]:
    """Steps `start` to `count` - 1; every epoch is a new permutation of what it shows.

    An epoch shows every example once, or as often as the weight of its part says: each part is
    gone through round and round in an order of its own, and every epoch goes on where the one
    before stopped. So after any number of epochs E, an example has been shown E times its weight,
    rounded up or down.

    Args:
        examples: how many there are.
        batch_size: examples of a step.
        seed: of all orders.
        count, start: which steps.
        parts: cover the examples in order; none: every weight is 1.
    """
    if parts and sum(part.examples for part in parts) != examples:
        raise ValueError("parts must cover all examples")
    epoch, position = _locate(start, examples, batch_size, parts)
    order: NDArray[np.int64] | None = None
    for number in range(start, count):
        while position >= steps_per_epoch(examples, batch_size, parts, epoch):
            epoch, position, order = epoch + 1, 0, None
        if order is None:
            shown = _shown(examples, parts, seed, epoch)
            order = shown[np.random.default_rng([seed, epoch]).permutation(len(shown))]
        chosen = order[position * batch_size : (position + 1) * batch_size]
        yield Step(number, epoch, tuple(int(index) for index in chosen))
        position += 1


def _locate(
    step: int, examples: int, batch_size: int, parts: Sequence[WeightedSource]
) -> tuple[int, int]:
    """The epoch that a step lies in, and how many of its steps come before."""
    if not _weighted(parts):
        return divmod(step, steps_per_epoch(examples, batch_size))
    epoch = 0
    while step >= (size := steps_per_epoch(examples, batch_size, parts, epoch)):
        epoch, step = epoch + 1, step - size
    return epoch, step


def _shown(
    examples: int, parts: Sequence[WeightedSource], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The indices that an epoch shows, ascending."""
    if not _weighted(parts):
        return np.arange(examples)
    found, first = [], 0
    for number, part in enumerate(parts):
        if part.examples:
            # Three numbers, the last not 0: no epoch's permutation has this seed.
            rounds = np.random.default_rng([seed, number, 1]).permutation(part.examples)
            taken = np.arange(part.shown(epoch), part.shown(epoch + 1)) % part.examples
            found.append(first + rounds[taken])
        first += part.examples
    return np.sort(np.concatenate(found))


def _weighted(parts: Sequence[WeightedSource]) -> bool:
    return any(part.weight != 1.0 for part in parts)


def choose_held_out(prompts: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which records are held out, [n]: about a fraction of them, whole prompts at a time.

    Prompts are taken in the order of a seeded hash until the fraction, rounded to whole records,
    at least one and not all, is reached; one with more records than are still wanted is passed
    over. So the choice depends on the prompts and the seed, not on the order of the records.

    Args:
        prompts: `records.prompt_key` of each record.
        fraction: of the records, between 0 and 1.
        seed: gives another choice.

    Raises UserError when no prompt can be held out.
    """
    distinct, numbers, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    wanted = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    key = seed.to_bytes(8, "little")
    hashes = [hashlib.blake2b(p.tobytes(), key=key, digest_size=8).digest() for p in distinct]
    held = np.zeros(len(distinct), dtype=np.bool_)
    for prompt in sorted(range(len(distinct)), key=hashes.__getitem__):
        if counts[prompt] <= wanted:
            held[prompt] = True
            wanted -= int(counts[prompt])
        if not wanted:
            break
    if not held.any():
        raise UserError(
            f"validation.fraction {fraction:g}: {len(prompts)} records with {len(distinct)} "
            "different prompts cannot be divided so that no prompt is in both parts. Name held-out "
            "records with validation.data instead."
        )
    return held[numbers]


def shared_prompts(trained: NDArray[np.uint64], held_out: NDArray[np.uint64]) -> tuple[int, int]:
    """How many records to train on, and how many held-out ones, have a prompt of the other part."""
    both = np.intersect1d(trained, held_out)
    return int(np.isin(trained, both).sum()), int(np.isin(held_out, both).sum())
