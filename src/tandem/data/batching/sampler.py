"""Choose the examples of each optimizer step, by seed, weights and batch size alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

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
        """For each example, how often its index came before it in this step."""
        seen: Counter[int] = Counter()
        copies = []
        for index in self.examples:
            copies.append(seen[index])
            seen[index] += 1
        return copies


@dataclass(frozen=True)
class WeightedSource:
    """Consecutive examples that an epoch shows `weight` times each."""

    examples: int
    weight: float = 1.0

    def shown(self, epochs: int) -> int:
        """Return how many examples the first `epochs` epochs show, repeated ones each time.

        The total is rounded up, so that the rounding of epochs does not add up.
        """
        # The decimal that the recipe has, not its nearest binary fraction.
        return math.ceil(epochs * self.examples * Fraction(str(self.weight)))


def tenth(steps: int) -> int:
    """Return a tenth of some steps, rounded up: the interval of what happens about ten times."""
    return max(1, -(-steps // 10))


class Duration(Protocol):
    """How long a stage trains: `max_steps` optimizer steps, or else `epochs`, or else one epoch."""

    @property
    def epochs(self) -> float | None: ...
    @property
    def max_steps(self) -> int | None: ...


@dataclass(frozen=True)
class StepSampler:
    """Chooses the examples of each step. Every epoch is a new permutation of what it shows.

    An epoch shows every example as often as its source's weight says. It goes through each source
    in that source's own order, and the next epoch continues where it stopped. So after any number
    of epochs E an example was shown E times its weight, rounded up or down.
    """

    examples: int  # how many there are
    batch_size: int  # examples of a step; the last step of an epoch may have fewer
    seed: int = 0  # of all orders
    # cover the examples in order; without any, every weight is 1
    sources: tuple[WeightedSource, ...] = ()

    def __post_init__(self) -> None:
        if self.examples < 1 or self.batch_size < 1:
            raise ValueError("examples and batch_size must be positive")
        if self.sources and sum(source.examples for source in self.sources) != self.examples:
            raise ValueError("sources must cover all examples")

    def epoch_size(self, epoch: int = 0) -> int:
        """Return how many examples an epoch shows, repeated ones each time."""
        if not self._weighted:
            return self.examples
        return sum(source.shown(epoch + 1) - source.shown(epoch) for source in self.sources)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Return the steps of an epoch; with fractional weights, epochs may differ by a few."""
        return math.ceil(self.epoch_size(epoch) / self.batch_size)

    def total_steps(self, duration: Duration) -> int:
        """Return the number of steps; a fraction of an epoch rounds up to whole steps."""
        if duration.max_steps is not None:
            return duration.max_steps
        epochs = 1.0 if duration.epochs is None else duration.epochs
        if not self._weighted:
            return math.ceil(epochs * self.steps_per_epoch())
        whole = math.floor(epochs)
        sizes = [self.steps_per_epoch(epoch) for epoch in range(whole + 1)]
        return sum(sizes[:whole]) + math.ceil((epochs - whole) * sizes[whole])

    def epochs_after(self, step: int) -> float:
        """Return how many epochs, the last one in part, lie before a step."""
        if not self._weighted:
            return step / self.steps_per_epoch()
        epoch, position = self._locate(step)
        return epoch + position / max(1, self.steps_per_epoch(epoch))

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield steps `start` to `stop` - 1."""
        epoch, position = self._locate(start)
        order: NDArray[np.int64] | None = None
        for number in range(start, stop):
            while position >= self.steps_per_epoch(epoch):
                epoch, position, order = epoch + 1, 0, None
            if order is None:
                shown = self._shown(epoch)
                order = shown[np.random.default_rng([self.seed, epoch]).permutation(len(shown))]
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield Step(number, epoch, tuple(int(index) for index in chosen))
            position += 1

    @property
    def _weighted(self) -> bool:
        return any(source.weight != 1.0 for source in self.sources)

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and how many steps of that epoch come before it."""
        if not self._weighted:
            return divmod(step, self.steps_per_epoch())
        epoch = 0
        while step >= (size := self.steps_per_epoch(epoch)):
            epoch, step = epoch + 1, step - size
        return epoch, step

    def _shown(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices that an epoch shows, ascending."""
        if not self._weighted:
            return np.arange(self.examples)
        indices, first = [], 0
        for number, source in enumerate(self.sources):
            if source.examples:
                # Three numbers, the last not 0: no epoch's permutation has this seed.
                rounds = np.random.default_rng([self.seed, number, 1]).permutation(source.examples)
                taken = np.arange(source.shown(epoch), source.shown(epoch + 1)) % source.examples
                indices.append(first + rounds[taken])
            first += source.examples
        return np.sort(np.concatenate(indices))


def choose_held_out(prompts: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return which records are held out, [n]: about a fraction of them, whole prompts at a time.

    Prompts (`records.prompt_key` of each record) are taken in the order of a seeded hash until the
    fraction, rounded to whole records, at least one and not all, is reached; a prompt with more
    records than are still needed is skipped. So the records' order does not matter. Raises
    UserError when no prompt can be held out.
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
    """Count the training records and the held-out ones that have a prompt of the other part."""
    both = np.intersect1d(trained, held_out)
    return int(np.isin(trained, both).sum()), int(np.isin(held_out, both).sum())
