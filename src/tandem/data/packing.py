"""A step's trees into micro-batches under a token budget: the schedule, not the mathematics."""

from __future__ import annotations

from collections.abc import Sequence


def pack(tokens: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing: positions of the trees that share each micro-batch.

    Every tree is placed whole. One that alone exceeds the budget gets a micro-batch of its own:
    the budget is a target for memory, never a reason to cut a record.

    Args:
        tokens: the number of tokens of each tree of the step.
        budget: tokens that a micro-batch should not exceed.

    Returns:
        Micro-batches in the order of their first tree, each a tuple of positions in `tokens`.
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
    """Micro-batches of padded rows: sequences times the longest of them stays within the budget.

    The longest tree that is left opens a micro-batch or joins the one whose rows are shortest, so
    that neighbours in length share it. As in `pack`, no tree is cut.

    Args:
        shapes: for each tree, its sequences and the tokens of the longest.
        budget: tokens, padding included, that a micro-batch should not exceed.

    Returns:
        Micro-batches in the order of their first tree, each a tuple of positions in `shapes`.
    """
    if budget < 1:
        raise ValueError("budget must be positive")
    bins: list[list[int]] = []
    longest: list[int] = []  # of each micro-batch, which its first tree decides
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
