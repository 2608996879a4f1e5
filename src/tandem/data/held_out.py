"""Which records are held out of training: by a hash of their prompts, never one of two alike."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tandem.errors import UserError


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
