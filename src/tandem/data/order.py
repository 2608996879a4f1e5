"""Which examples make up each optimizer step: a function of seed and global batch size alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the epoch it lies in and its examples' indices."""

    number: int
    epoch: int
    examples: tuple[int, ...]


def total_steps(
    examples: int, batch_size: int, *, epochs: float | None = None, max_steps: int | None = None
) -> int:
    """Number of optimizer steps; the last step of an epoch may be smaller than the others.

    `max_steps` wins over `epochs`; a fraction of an epoch rounds up to whole steps.
    """
    if examples < 1 or batch_size < 1:
        raise ValueError("examples and batch_size must be positive")
    if max_steps is not None:
        return max_steps
    return math.ceil((1.0 if epochs is None else epochs) * steps_per_epoch(examples, batch_size))


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps that show every example once."""
    return math.ceil(examples / batch_size)


def steps(
    examples: int, batch_size: int, *, seed: int, count: int, start: int = 0
) -> Iterator[Step]:
    """Steps `start` to `count` - 1; every epoch is a new permutation of all examples."""
    per_epoch = steps_per_epoch(examples, batch_size)
    order: np.ndarray | None = None
    order_epoch = -1
    for number in range(start, count):
        epoch, position = divmod(number, per_epoch)
        if order is None or epoch != order_epoch:
            order = np.random.default_rng([seed, epoch]).permutation(examples)
            order_epoch = epoch
        chosen = order[position * batch_size : (position + 1) * batch_size]
        yield Step(number, epoch, tuple(int(index) for index in chosen))
