"""tandem, TRL and a plain loop on the same records: `python -m benchmarks.training --help`.

Every measurement runs in a process of its own, the sides take turns, and medians of the repeats
are compared. Seconds exclude imports, loading and tokenising. All sides use float32, the same
token ids, LoRA on q, k and v, the same number of threads and of records to an optimizer step
(TRL's packed rows: about the same). TRL: no activation checkpointing, the reference computed
once before training, packing best-fit with boundaries kept. The plain loop: transformers and
peft, one sequence at a time, so without padding, and only trained rows meet the output head.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .report import Environment, Results, markdown
from .roofline import needed_operations
from .work import (
    Measured,
    Stage,
    Work,
    read_trees,
    write_first_lines,
    write_model,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Apart:
    """Measures in a new process, with nothing left over from the one before."""

    threads: int

    def measure(self, work: Work) -> Measured:
        """One side's measurement."""
        return Measured(**self._run(work.as_dict()))

    def gemm_rate(self) -> float:
        """Operations a second of a float32 product."""
        return float(self._run({"threads": self.threads})["gemm_rate"])

    def _run(self, task: dict[str, Any]) -> dict[str, Any]:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "benchmarks.sides", json.dumps(task)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{task.get('side', 'gemm')} failed:\n{done.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def main(
    arguments: Sequence[str] | None = None, apart: Callable[[int], Any] = Apart
) -> dict[str, str]:
    """Measure, print one table a stage, and return them; `apart` makes what measures."""
    options = _parse(arguments)
    for path in (options.tokenizer, options.pairs_file, options.conversations_file):
        if not path.exists():
            raise SystemExit(
                f"{path} is not here. The benchmark needs the data beside the repository, or name "
                "other files with --tokenizer, --pairs-file and --conversations-file."
            )
    bench = apart(options.threads)
    tables: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = Path(name)
        _say(f"writing a model of {options.size}M parameters")
        write_model(options.size, options.tokenizer, scratch / "model")
        stages: tuple[Stage, ...] = ("dpo", "sft") if options.stage == "both" else (options.stage,)
        for stage in stages:
            results = _measure(bench, _works(options, stage, scratch), options, scratch)
            tables[stage] = markdown(results, Environment.here(options.threads))
            print(tables[stage], flush=True)
            if options.save:
                RESULTS.mkdir(exist_ok=True)
                file = RESULTS / f"training-{stage}-{options.size}m.md"
                file.write_text(tables[stage], encoding="utf-8")
                _say(f"written to {file.relative_to(ROOT)}")
    return tables


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pairs = SHARED / "pairs" / "orca_dpo_pairs.jsonl"
    conversations = SHARED / "conversations" / "slimorca_format.jsonl"
    tokenizer = SHARED / "tokenizers" / "mistral_v1_32000"
    add = parser.add_argument
    add("--stage", choices=("dpo", "sft", "both"), default="both")
    add("--size", type=int, choices=(1, 10, 60, 150), default=60, help="million parameters")
    add("--repeats", type=int, default=3)
    add("--pairs", type=int, default=32, help="records of DPO")
    add("--conversations", type=int, default=64, help="records of SFT")
    add("--batch-size", type=int, default=16, help="records of an optimizer step")
    add(
        "--sides", nargs="+", choices=("tandem", "plain", "trl"), default=("tandem", "plain", "trl")
    )
    add("--trl-batches", type=int, nargs="+", default=(1, 2), help="TRL's micro-batches to try")
    add("--trl-packed", type=int, nargs="*", default=(2048,), help="TRL's packed rows to try")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--save", action="store_true", help="also write the tables to benchmarks/results/")
    add("--pairs-file", type=Path, default=pairs)
    add("--conversations-file", type=Path, default=conversations)
    add("--tokenizer", type=Path, default=tokenizer)
    return parser.parse_args(arguments)


def _works(options: argparse.Namespace, stage: Stage, scratch: Path) -> list[Work]:
    """What one round measures, in turn."""
    source = options.pairs_file if stage == "dpo" else options.conversations_file
    count = options.pairs if stage == "dpo" else options.conversations
    data = scratch / f"{stage}.jsonl"
    write_first_lines(source, count, data)
    base = Work(
        side="tandem",
        stage=stage,
        model=str(scratch / "model"),
        data=str(data),
        scratch="",
        batch_size=min(options.batch_size, count),
        threads=options.threads,
    )
    works = [replace(base, side=side) for side in ("tandem", "plain") if side in options.sides]
    if "trl" in options.sides:
        works += [replace(base, side="trl", size=size) for size in options.trl_batches]
        if stage == "sft":
            works += [replace(base, side="trl-packed", size=size) for size in options.trl_packed]
    return works


def _measure(bench: Any, works: list[Work], options: argparse.Namespace, scratch: Path) -> Results:
    found: dict[str, list[Measured]] = {work.name: [] for work in works}
    rates = []
    for repeat in range(options.repeats):
        rates.append(bench.gemm_rate())
        # Whoever goes first meets another state of the machine each time.
        shift = repeat % len(works)
        for work in works[shift:] + works[:shift]:
            folder = tempfile.mkdtemp(dir=scratch)
            measured = bench.measure(replace(work, scratch=folder))
            found[work.name].append(measured)
            seconds = measured.loop_seconds + measured.reference_seconds
            _say(f"{work.stage} {repeat + 1}/{options.repeats} {work.name}: {seconds:.1f} s")
    first = works[0]
    trees = read_trees(first.stage, Path(first.model), Path(first.data))
    operations = needed_operations(trees, AutoConfig.from_pretrained(first.model), first.stage)
    return Results(
        stage=first.stage,
        size=options.size,
        batch_size=first.batch_size,
        repeats=options.repeats,
        measured=found,
        operations=operations,
        gemm_rate=max(rates),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
