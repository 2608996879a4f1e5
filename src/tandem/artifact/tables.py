"""Tables as text: how long their cells may be."""

from __future__ import annotations

import csv

# Characters of a cell; more is a quote that was never closed rather than a text.
_LONGEST_CELL = 2**28


def allow_long_cells() -> None:
    """Let tables hold long texts; the csv module's own limit is 128 KiB, for all its readers."""
    csv.field_size_limit(_LONGEST_CELL)
