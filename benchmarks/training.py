"""tandem, TRL and a plain loop on the same records: `python -m benchmarks.training --help`.

Every measurement runs in a process of its own, the sides take turns, and medians of the repeats
are compared. Seconds exclude imports, loading and tokenising. All sides get the same token ids in
the same order, the recipe's LoRA, the same number of threads and of records to an optimizer step
(TRL's packed rows: about the same; TRL's defaults: their own), and their first steps must have
the same loss and log-probs. docs/internals/benchmarks.md says what each side is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .apart import ROOT, Apart
from .record import Environment, Record, Task, log, resumed, take_turns
from .roofline import needed_operations
from .tables import RESULTS, markdown, write
from .work import (
    PADDED,
    Stage,
    Work,
    read_trees,
    sequence_tokens,
    source_of,
    write_first_lines,
    write_model,
)

SHARED = ROOT.parent / "shared" / "data"
SIDES = ("tandem", "again", "plain", "trl", "default")


def main(
    arguments: Sequence[str] | None = None, apart: Callable[[int], Any] = Apart
) -> dict[str, str]:
    """Measure, print one table a stage, and return them; `apart` makes what measures."""
    options = _parse(arguments)
    check_files(options)
    bench = apart(options.threads)
    tables: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = Path(name)
        log(f"writing a model of {options.size}M parameters")
        write_model(options.size, options.tokenizer, scratch / "model")
        stages: tuple[Stage, ...] = ("dpo", "sft") if options.stage == "both" else (options.stage,)
        for stage in stages:
            file = options.results / f"training-{stage}-{options.size}m.json"
            tables[stage] = _measure(bench, options, stage, scratch, file)
            print(tables[stage], flush=True)
    return tables


def _measure(
    bench: Any, options: argparse.Namespace, stage: Stage, scratch: Path, file: Path
) -> str:
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
    record = new_record(
        base,
        tasks := _tasks(options, base),
        Environment.here(options.threads),
        model=f"{options.size}M parameters",
        command=_command(options, stage, count),
    )
    keep = options.save or options.resume
    if options.resume:
        record = resumed(record, file)
    (runs := scratch / f"{stage}-runs").mkdir()
    file.parent.mkdir(parents=True, exist_ok=True)
    take_turns(bench, tasks, record, runs, file if keep else None)
    if not keep:
        return markdown(record)
    record.save(file)
    log(f"written to {file.parent}")
    return write(record, file)


def new_record(
    base: Work, tasks: Sequence[Task], environment: Environment, *, model: str, command: str
) -> Record:
    """A record without measurements: what is asked for, and the operations it needs."""
    trees = read_trees(base.stage, Path(base.model), source_of(base))
    return Record(
        settings={
            "stage": base.stage,
            "model": model,
            "dtype": str(base.dtype).removeprefix("torch."),
            "batch_size": base.batch_size,
            "records": len(trees),
            "tokens": sequence_tokens(trees),
            "command": command,
            "sides": {
                task.work.name: {
                    "side": task.work.side,
                    "size": task.work.size,
                    "records": task.work.records,
                    "repeats": task.repeats,
                }
                for task in tasks
            },
        },
        environment=environment,
        needed=needed_operations(trees, AutoConfig.from_pretrained(base.model), base.stage),
    )


def _tasks(options: argparse.Namespace, base: Work) -> list[Task]:
    """What one round measures, in turn."""
    dpo = base.stage == "dpo"
    works = [base] if "tandem" in options.sides else []
    if "plain" in options.sides:
        works += [replace(base, side="plain", size=size) for size in options.plain_batches]
    if "trl" in options.sides:
        works += [replace(base, side="trl", size=size) for size in options.trl_batches]
        if not dpo:
            works += [replace(base, side="trl-packed", size=size) for size in options.trl_packed]
    slow = options.slow_repeats or options.repeats
    padded = [work.side in ("plain", "trl") and work.size > 1 for work in works]
    tasks = [Task(w, slow if p else options.repeats) for w, p in zip(works, padded, strict=True)]
    if "again" in options.sides and dpo:
        tasks.append(Task(replace(base, side="tandem-again"), options.again_repeats))
    if "default" in options.sides:
        asked = options.default_pairs if dpo else options.default_conversations
        count = Path(base.data).read_text(encoding="utf-8").count("\n")
        default = replace(base, side="trl-default", records=asked if asked < count else 0)
        tasks.append(Task(default, options.default_repeats))
    if not tasks:
        raise SystemExit(f"--sides {' '.join(options.sides)} leaves nothing to measure")
    return tasks


def check_files(options: argparse.Namespace) -> None:
    """Raise SystemExit when the data are not where they are looked for."""
    for path in (options.tokenizer, options.pairs_file, options.conversations_file):
        if not path.exists():
            raise SystemExit(
                f"{path} is not here. The benchmark reads real records from {SHARED}; name "
                "other files with --tokenizer, --pairs-file and --conversations-file."
            )


def add_files(parser: argparse.ArgumentParser) -> None:
    """The options that say where the data are."""
    add = parser.add_argument
    add("--pairs-file", type=Path, default=SHARED / "pairs" / "orca_dpo_pairs.jsonl")
    conversations = SHARED / "conversations" / "slimorca_format.jsonl"
    add("--conversations-file", type=Path, default=conversations)
    add("--tokenizer", type=Path, default=SHARED / "tokenizers" / "mistral_v1_32000")
    add("--results", type=Path, default=RESULTS, help="where --save and --resume write")


def _command(options: argparse.Namespace, stage: Stage, count: int) -> str:
    """The command line of a stage's table; sides and their sizes are in the table."""
    records = "pairs" if stage == "dpo" else "conversations"
    return (
        f"python -m benchmarks.training --stage {stage} --size {options.size} --repeats "
        f"{options.repeats} --{records} {count}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", choices=("dpo", "sft", "both"), default="both")
    add("--size", type=int, choices=(1, 10, 60, 150), default=60, help="million parameters")
    add("--repeats", type=int, default=3)
    add("--pairs", type=int, default=32, help="records of DPO")
    add("--conversations", type=int, default=64, help="records of SFT")
    add("--batch-size", type=int, default=16, help="records of an optimizer step")
    add("--sides", nargs="+", choices=SIDES, default=SIDES)
    add("--plain-batches", type=int, nargs="+", default=(1, 2, PADDED), help="micro-batches to try")
    add("--trl-batches", type=int, nargs="+", default=(1, 2), help="TRL's micro-batches to try")
    add("--trl-packed", type=int, nargs="*", default=(2048,), help="TRL's packed rows to try")
    add("--default-pairs", type=int, default=PADDED, help="records of TRL's slow defaults")
    add("--default-conversations", type=int, default=2 * PADDED)
    add("--default-repeats", type=int, default=1)
    add("--again-repeats", type=int, default=1, help="runs with a warm reference store")
    add("--slow-repeats", type=int, help="of sides that pad; as --repeats if not given")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--save", action="store_true", help="also write JSON, table and chart to --results")
    add("--resume", action="store_true", help="--save, without what the JSON already holds")
    add_files(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
