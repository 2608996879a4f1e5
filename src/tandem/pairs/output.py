"""Pairs as files: the orca_dpo_pairs form, in JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tandem.artifact.files import atomic_file, atomic_write_text
from tandem.pairs.filter import Pair

_KEYS = ("system", "question", "chosen", "rejected")


def pairs_file(folder: Path, name: str, kind: str) -> Path:
    """Where pairs go: `name` is pairs or heldout, `kind` jsonl or parquet."""
    return folder / f"{name}.{kind}"


def made_pairs(folder: Path, name: str = "pairs") -> Path | None:
    """The file of pairs that a stage's folder has, whatever its kind; None for none."""
    found = (pairs_file(folder, name, kind) for kind in ("jsonl", "parquet"))
    return next((path for path in found if path.exists()), None)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs in their order, whole or not at all; the suffix says how."""
    rows = [pair.row() for pair in pairs]
    if path.suffix == ".jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(path, lines)
        return
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(key, pyarrow.string()) for key in _KEYS])
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)
