"""How fast `tandem check` is, and in how much memory: `python -m benchmarks.checking --help`.

The records are those of `benchmarks.encoding`: drawn from real ones and numbered, so that most are
near duplicates of others. The command runs in a process of its own, as it is typed; memory is that
of its process tree, shared pages counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .apart import ROOT
from .encoding import tree_memory, write_data
from .record import Environment
from .report import RESULTS
from .training import SHARED

_SOURCE = SHARED / "conversations" / "slimorca_format.jsonl"
_EVERY_SECONDS = 0.3


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the table, and return it."""
    options = _parse(arguments)
    if not options.source.exists():
        raise SystemExit(f"{options.source} is not here. Name another file with --source.")
    flags = ["--model", str(options.model)] if options.model else []
    rows = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=options.scratch) as scratch:
        for suffix in options.formats:
            data = Path(scratch) / f"data.{suffix}"
            write_data(options.source, options.records, data)
            rows.append((suffix, data.stat().st_size, *check(data, flags)))
            data.unlink()
    table = _table(options, rows)
    print(table, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "checking.md").write_text(table, encoding="utf-8")
    return table


def check(data: Path, flags: Sequence[str]) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak bytes and the report of one `tandem check`."""
    command = [sys.executable, "-m", "tandem", "check", str(data), "--json", *flags]
    package = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=package, stdout=output)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(_EVERY_SECONDS)
        seconds = time.perf_counter() - began
        output.seek(0)
        return seconds, peak, json.load(output)["data"][0]


def _table(options: argparse.Namespace, rows: Sequence[tuple[Any, ...]]) -> str:
    how = f"with the tokenizer of {options.model.name}" if options.model else "without a tokenizer"
    lines = [
        f"# Checking {options.records} conversations, {how}",
        "",
        "| | GiB | seconds | records/s | peak memory, MiB | near duplicates found |",
        "|---|---|---|---|---|---|",
    ]
    for suffix, size, seconds, peak, found in rows:
        counts = {finding["name"]: finding["count"] for finding in found["findings"]}
        lines.append(
            f"| {suffix} | {size / 2**30:.2f} | {seconds:.0f} | "
            f"{found['records']['read'] / seconds:.0f} | {peak / 2**20:.0f} | "
            f"{counts.get('near_duplicates', 0)} |"
        )
    cores = len(os.sched_getaffinity(0))
    environment = Environment.here(cores)
    lines += ["", f"{environment.processor}, cores: {cores}. {environment.versions}.", ""]
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checking", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet"])
    parser.add_argument("--source", type=Path, default=_SOURCE)
    parser.add_argument("--model", type=Path, help="whose tokenizer; none by default")
    parser.add_argument("--scratch", type=Path, help="where the data is written")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/checking.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
