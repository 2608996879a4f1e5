"""Numbers as people read them: percentages, counts, durations, sizes; a collapse as a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

MISSING = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share between 0 and 1 as a percentage."""
    return MISSING if not is_number(value) else f"{100 * float(value):.{digits}f} %"


def number(value: float | None, significant: int = 4) -> str:
    """Write a plain number in few digits: `0.6931`, `12.35`, `1.0e-04`, `–` when there is none."""
    if not is_number(value):
        return MISSING
    x = float(value)
    if isinstance(value, int) or x == 0:
        return f"{x:g}"
    if abs(x) < 1e-3 or abs(x) >= 1e6:
        mantissa, exponent = f"{x:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    whole = len(str(int(abs(x))))
    places = max(0, significant - whole)
    if abs(x) < 0.01:  # two significant digits: 0.0015, and not 0.002
        places = max(places, 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{places}f}"


def count(value: float | None) -> str:
    """Write a whole number with thin thousands separators."""
    return MISSING if not is_number(value) else f"{round(float(value)):,}".replace(",", "\u202f")


def short_count(value: float | None) -> str:
    """Write a count in at most four characters and a unit: `950`, `12.9k`, `1.25M`."""
    if not is_number(value):
        return MISSING
    x = float(value)
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds: float | None) -> str:
    """Write seconds as `850 ms`, `12.4 s`, `3 min 05 s`, `2 h 10 min` or `3 d 04 h`."""
    if not is_number(seconds):
        return MISSING
    s = float(seconds or 0)
    if s < 1:
        return f"{1000 * s:.0f} ms"
    if s < 60:
        return f"{s:.1f} s"
    minutes, rest = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def size(value: float | None) -> str:
    """Write bytes as MiB or GiB."""
    if not is_number(value):
        return MISSING
    mebibytes = float(value) / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f} GiB"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value read from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# A fall of the chosen log-probs by more than these is a collapse.
_FALL_NATS, _FALL_SHARE = 2.0, 0.25


def chosen_collapse(metrics: Sequence[Mapping[str, Any]], beta: object) -> str | None:
    """Return a sentence if DPO unlearnt the chosen answers while the margin grew (trl#800).

    In the last quarter of the logged steps, the log-probs are compared with the same pairs' under
    the reference, because different steps have different pairs. Some fall is usual in DPO. In a
    collapse, log-probs fall by more than a quarter (a perplexity of 5 becomes 7.5; a limit in nats
    alone would catch every long answer and no short one), and by more than 2 nats (an answer less
    than a seventh as probable; for a short, nearly certain answer a smaller fall means nothing).

    Args:
        metrics: lines of metrics.jsonl.
        beta: of the run; None, or no number, where it is not known.
    """
    keys = ("logps/chosen", "rewards/chosen", "rewards/margins")
    rows = [m for m in metrics if all(is_number(m.get(key)) for key in keys)]
    if not is_number(beta) or not rows:
        return None
    last = rows[-max(1, len(rows) // 4) :]
    logp, reward, margin = (sum(float(m[key]) for m in last) / len(last) for key in keys)
    fall = -reward / beta
    reference = logp + fall
    if margin <= 0 or fall <= max(_FALL_NATS, _FALL_SHARE * abs(reference)):
        return None
    return (
        f"collapse of the chosen log-probs: while the margin grew to {number(margin, 3)}, the "
        f"chosen answers became less probable: log-prob {number(reference)} under the reference, "
        f"{number(logp)} at the end. The model unlearns what it should prefer. Fewer steps, a "
        "smaller learning rate or a larger beta help."
    )
