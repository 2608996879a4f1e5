"""Pack a step's examples into micro-batches under a token budget, and share them among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tandem.data.encoded.example import Example

_PADDED_BATCH = 8  # sequences of a padded batch, with which summaries and plans compare
_EVEN = 0.005  # a rank whose cost is within this share of the mean needs no other exchange


@dataclass(frozen=True)
class StepPlan:
    """Which rank computes what in a step; its examples, the budget and the ranks decide it."""

    # each rank's micro-batches in order, each a tuple of positions in the step
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    # what every rank runs; a rank with fewer of its own repeats an example with weight zero for the
    # rest, because gradients are exchanged in the last
    micro_batches: int
    fill: float  # mean share of the budget that the micro-batches use, at most 1 each
    imbalance: float  # the costliest rank's cost by the mean, 1 when all have the same


def plan_step(
    tokens: Sequence[int],
    costs: Sequence[float],
    budget: int,
    ranks: int = 1,
    *,
    pack_share: Callable[[Sequence[int]], list[tuple[int, ...]]] | None = None,
) -> StepPlan:
    """Assign a step's examples to ranks of about equal cost, and pack each rank's share.

    A rank with fewer micro-batches than another splits its fullest ones; only one that has no
    example left to split gets fewer.

    Args:
        tokens: the number of tokens that each example of the step feeds.
        costs: the time of each in any unit; see `example_cost`.
        budget: tokens that a micro-batch should not exceed.
        ranks: how many processes share the step.
        pack_share: makes micro-batches of some of the step's examples, as positions among these.
    """
    if len(tokens) != len(costs):
        raise ValueError("tokens and costs must be of the same examples")
    shares = [tuple(range(len(tokens)))] if ranks == 1 else assign_to_ranks(costs, ranks)
    plans = []
    for share in shares:
        packed = (
            pack([tokens[i] for i in share], budget) if pack_share is None else pack_share(share)
        )
        plans.append([tuple(share[i] for i in members) for members in packed])
    most = max(len(plan) for plan in plans)
    plans = [_split(plan, tokens, most) for plan in plans]
    own = [sum(tokens[i] for i in members) for plan in plans for members in plan]
    loads = [sum(costs[i] for i in share) for share in shares]
    mean = sum(loads) / ranks
    return StepPlan(
        tuple(tuple(plan) for plan in plans),
        most,
        sum(min(1.0, size / budget) for size in own) / len(own) if own else 0.0,
        max(loads) / mean if mean else 1.0,
    )


def pack(tokens: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Pack best-fit decreasing: return the positions in `tokens` of each micro-batch's examples.

    No example is cut. One that alone exceeds the budget, which is a target for memory, gets its own
    micro-batch. Micro-batches come in the order of their first example.
    """
    if budget < 1:
        raise ValueError("budget must be positive")
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        size = tokens[position]
        fitting = [i for i in range(len(bins)) if room[i] >= size]
        if fitting:
            tightest = min(fitting, key=lambda i: (room[i], i))
            bins[tightest].append(position)
            room[tightest] -= size
        else:
            bins.append([position])
            room.append(budget - size)
    return sorted(tuple(sorted(members)) for members in bins)


def pack_padded(shapes: Sequence[tuple[int, int]], budget: int) -> list[tuple[int, ...]]:
    """Pack padded rows: sequences times the longest of them stays within the budget.

    `shapes` has each example's sequences and the tokens of its longest. The longest remaining
    example opens a micro-batch or joins the one whose rows are shortest, so that examples of
    similar length share it. As in `pack`, no example is cut.
    """
    if budget < 1:
        raise ValueError("budget must be positive")
    bins: list[list[int]] = []
    longest: list[int] = []  # of each micro-batch, which its first example decides
    rows: list[int] = []
    for position in sorted(range(len(shapes)), key=lambda i: (-shapes[i][1], i)):
        sequences, length = shapes[position]
        fitting = [i for i in range(len(bins)) if (rows[i] + sequences) * longest[i] <= budget]
        if fitting:
            nearest = fitting[-1]
            bins[nearest].append(position)
            rows[nearest] += sequences
        else:
            bins.append([position])
            longest.append(length)
            rows.append(sequences)
    return sorted(tuple(sorted(members)) for members in bins)


def padded_tokens(lengths: ArrayLike) -> int:
    """Return the tokens that padded batches of the usual size feed for sequences of lengths [S]."""
    tokens = np.asarray(lengths, dtype=np.int64)
    starts = np.arange(0, len(tokens), _PADDED_BATCH)
    if not len(starts):
        return 0
    sizes = np.diff(np.append(starts, len(tokens)))
    return int((np.maximum.reduceat(tokens, starts) * sizes).sum())


def assign_to_ranks(costs: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """Return the positions of the examples that each rank computes, with costs nearly even.

    The costliest come first, each to the rank with the least so far; then examples of the costliest
    rank move to another, or swap with one there, while that lowers the costlier of the two.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(ranks), key=lambda r: (loads[r], r))
        shares[least].append(position)
        loads[least] += costs[position]
    while _exchange(costs, shares, loads):
        pass
    return [tuple(sorted(share)) for share in shares]


def example_cost(example: Example, attention_weight: float) -> float:
    """Return an example's cost: its tokens, and the weighted number of pairs that attention sees.

    `attention_weight` is a visible pair's time in attention, divided by a token's other time.
    """
    prefix = len(example.prefix.input_ids)
    visible = prefix * prefix / 2
    for branch in example.branches:
        length = len(branch.input_ids)
        visible += length * prefix + length * length / 2
    return example.tokens + attention_weight * visible


def _exchange(costs: Sequence[float], shares: list[list[int]], loads: list[float]) -> bool:
    """Make the best move or swap away from the costliest rank; False when none lowers it."""
    top = max(range(len(loads)), key=lambda r: (loads[r], -r))
    mean = sum(loads) / len(loads)
    if loads[top] <= mean * (1 + _EVEN):
        return False
    best: tuple[float, int, int, int | None] | None = None
    for rank, share in enumerate(shares):
        if rank == top:
            continue
        for mine in shares[top]:
            for theirs in (None, *share):
                moved = costs[mine] - (0.0 if theirs is None else costs[theirs])
                worse = max(loads[top] - moved, loads[rank] + moved)
                if best is None or worse < best[0]:
                    best = (worse, rank, mine, theirs)
    # Swaps with a gain below rounding would go on for ever.
    if best is None or best[0] >= loads[top] * (1 - 1e-9):
        return False
    _, rank, mine, theirs = best
    shares[top].remove(mine)
    shares[rank].append(mine)
    if theirs is not None:
        shares[rank].remove(theirs)
        shares[top].append(theirs)
    for changed in (top, rank):
        loads[changed] = sum(costs[i] for i in shares[changed])
    return True


def _split(plan: list[tuple[int, ...]], tokens: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Split the same examples into `count` micro-batches, or as many as their number allows."""
    while len(plan) < count:
        divisible = [members for members in plan if len(members) > 1]
        if not divisible:
            break
        fullest = max(divisible, key=lambda members: (sum(tokens[i] for i in members), members))
        halves = assign_to_ranks([tokens[i] for i in fullest], 2)
        plan = [members for members in plan if members != fullest]
        plan += [tuple(fullest[i] for i in half) for half in halves]
    return sorted(plan)
