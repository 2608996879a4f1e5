"""How fast data is encoded, and in how much memory: `python -m benchmarks.encoding --help`.

Records are made from real ones, drawn at random, so that their lengths are distributed alike; each
gets a number, so that no two are the same. Each measurement runs in a process of its own on all
cores: tandem's preparation as a stage does it (with torch loaded), the bare tokenizer on the same
texts before and after it, TRL's preparation of a sample, and tandem again, which finds the result
of the first time. Memory is that of the whole process tree, shared pages counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from .apart import ROOT
from .record import Environment
from .tables import RESULTS
from .training import SHARED

_SOURCES = {
    "conversations": SHARED / "conversations" / "slimorca_format.jsonl",
    "pairs": SHARED / "pairs" / "orca_dpo_pairs.jsonl",
}
_EVERY_SECONDS = 0.5
_ROWS = 20_000


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the table, and return it."""
    options = _parse(arguments)
    source = options.source or _SOURCES[options.kind]
    for path in (options.tokenizer, source):
        if not path.exists():
            raise SystemExit(
                f"{path} is not here. The benchmark needs the data beside the repository, or name "
                "other files with --tokenizer and --source."
            )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        data = scratch / f"data.{options.format}"
        _say(f"writing {options.records} {options.kind}")
        write_data(source, options.records, data)
        table = _table(options, data.stat().st_size, _measure(options, data, scratch))
    print(table, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "encoding.md").write_text(table, encoding="utf-8")
    return table


def write_data(source: Path, count: int, target: Path) -> None:
    """`count` numbered records drawn from a JSON lines file, as JSON lines or Parquet."""
    rows = _numbered(source, count)
    if target.suffix == ".jsonl":
        with target.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    import pyarrow
    import pyarrow.parquet

    writer = None
    while some := list(islice(rows, _ROWS)):
        table = pyarrow.Table.from_pylist(some, schema=writer.schema if writer else None)
        writer = writer or pyarrow.parquet.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _numbered(source: Path, count: int) -> Iterator[dict[str, Any]]:
    lines = source.read_text(encoding="utf-8").rstrip("\n").split("\n")
    draw = random.Random(1)
    for number in range(count):
        row = json.loads(draw.choice(lines))
        if "question" in row:
            row["question"] += f" ({number})"
        else:
            turn = next(t for t in row["conversations"] if t["from"] not in ("system", "gpt"))
            turn["value"] += f" ({number})"
        yield row


def _measure(options: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Any]:
    task = {
        "kind": options.kind,
        "data": str(data),
        "tokenizer": str(options.tokenizer),
        "sample": options.sample,
        "cores": options.cores,
    }
    cache = scratch / "cache"
    found: dict[str, Any] = {"bare": [], "tandem": [], "cores": options.cores}
    for repeat in range(options.repeats):
        found["bare"].append(_run({**task, "side": "bare"}, cache))
        found["tandem"].append(_run({**task, "side": "tandem"}, scratch / f"cache-{repeat}"))
        found["bare"].append(_run({**task, "side": "bare"}, cache))
    found["again"] = _run({**task, "side": "tandem"}, scratch / f"cache-{options.repeats - 1}")
    found["trl"] = _run({**task, "side": "trl", "sample": options.trl_sample}, cache)
    return found


def _run(task: dict[str, Any], cache: Path) -> dict[str, float]:
    """One measurement in a new process, with the most memory its tree held."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, "-m", "benchmarks.encoding_side", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(min(_EVERY_SECONDS, 0.05 + (time.perf_counter() - began) / 50))
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{task['side']} failed:\n{errors.read()[-4000:]}")
        output.seek(0)
        result: dict[str, float] = json.loads(output.read().splitlines()[-1])
    _say(f"{task['side']}: {result['seconds']:.1f} s, {peak / 2**20:.0f} MiB")
    return {**result, "peak": peak}


def tree_memory(pid: int) -> int:
    """Bytes resident in a process and its descendants, a shared page counted once."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error, AttributeError):
                memory = one.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total


def _table(options: argparse.Namespace, size: int, found: dict[str, Any]) -> str:
    ours = min(found["tandem"], key=lambda one: one["seconds"])
    bare = mean(one["tokens"] / one["seconds"] for one in found["bare"])
    rate = ours["tokens"] / ours["seconds"]
    trl = found["trl"]
    core_rate = ours["tokens"] / ours["core_seconds"]
    bare_core = mean(one["tokens"] / one["core_seconds"] for one in found["bare"])
    rows = [
        (
            "tandem",
            f"{ours['records'] / ours['seconds']:.0f}",
            f"{rate:.0f}",
            f"{core_rate:.0f}",
            "1",
        ),
        (
            "the bare tokenizer",
            "-",
            f"{bare:.0f}",
            f"{bare_core:.0f}",
            f"{rate / bare:.2f}x, a core-second {core_rate / bare_core:.2f}x",
        ),
        (
            "TRL's preparation of a sample",
            f"{trl['records'] / trl['seconds']:.0f}",
            "-",
            "-",
            f"{ours['records'] / ours['seconds'] / (trl['records'] / trl['seconds']):.1f}x",
        ),
    ]
    command = f"--kind {options.kind} --records {options.records} --format {options.format}"
    peak = max(one["peak"] for one in found["tandem"])
    lines = [
        f"# Encoding {options.records} {options.kind}",
        "",
        f"{options.format}, {size / 2**30:.2f} GiB, {ours['tokens']} tokens of all sequences. "
        f"`python -m benchmarks.encoding {command}`.",
        "",
        "| | records/s | tokens/s | tokens a core-second | tandem is faster by |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"tandem: {ours['seconds']:.0f} s and at most {peak / 2**20:.0f} MiB resident in all "
        f"processes together, the file hashed and the result written to disk. A second start: "
        f"{found['again']['seconds']:.1f} s, {found['again']['peak'] / 2**20:.0f} MiB. The bare "
        f"tokenizer: `encode_batch` of {options.sample} records' rendered sequences, "
        f"{len(found['bare'])} times, from {_low_high(found['bare'])} tokens/s. TRL: "
        f"{trl['records']} records, with `dataset_num_proc` {found['cores']}.",
        "",
    ]
    environment = Environment.here(options.cores)
    lines.append(f"{environment.processor}, cores: {options.cores}. {environment.versions}.")
    return "\n".join(lines) + "\n"


def _low_high(measured: list[dict[str, float]]) -> str:
    rates = sorted(one["tokens"] / one["seconds"] for one in measured)
    return f"{rates[0]:.0f} to {rates[-1]:.0f}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--records", type=int, default=1_000_000)
    add("--kind", choices=tuple(_SOURCES), default="conversations")
    add("--format", choices=("jsonl", "parquet"), default="jsonl")
    add("--repeats", type=int, default=1, help="the quickest of tandem's counts")
    add("--sample", type=int, default=20_000, help="records for the bare tokenizer")
    add("--trl-sample", type=int, default=5_000, help="records for TRL")
    add("--source", type=Path, help="JSON lines to draw records from")
    add("--tokenizer", type=Path, default=SHARED / "tokenizers" / "mistral_v1_32000")
    add("--scratch", type=Path, help="where the generated data and its store are put meanwhile")
    add("--save", action="store_true", help="also write benchmarks/results/encoding.md")
    options = parser.parse_args(arguments)
    options.cores = len(os.sched_getaffinity(0))
    options.sample = min(options.sample, options.records)
    options.trl_sample = min(options.trl_sample, options.records)
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
