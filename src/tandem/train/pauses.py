"""Where runs pause that are compared on the way, as shares of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tandem.errors import UserError


def pause_name(share: float) -> str:
    """What a pause after a share of all steps is called."""
    return f"{share:.6g} of all steps"


def pause_steps(shares: Sequence[float], total: int) -> list[int]:
    """The steps after which a run of `total` steps pauses.

    Raises UserError for a run too short to have them all.
    """
    steps = [max(1, round(share * total)) for share in shares]
    if any(late <= early for early, late in pairwise([*steps, total])):
        raise UserError(
            f"--halving: a run of {total} steps is too short to be compared after "
            f"{', '.join(f'{share:.3g}' for share in shares)} of its steps; take fewer --rungs, a "
            "larger --keep, or more steps"
        )
    return steps
