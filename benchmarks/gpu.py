"""The GPU part: Mistral-7B's shape on CUDA, `python -m benchmarks.gpu`.

Random bfloat16 weights, the recipe's LoRA, orca pairs and SlimOrca conversations at their real
lengths. The sides are those of `benchmarks.training`, and Liger and Unsloth where they are
installed. The model is written once (14 GB in --scratch) and loaded by every side.
tandem is measured with its base in 4 bits and compiled as well. --smoke takes one step of each of
these and no peer. Without CUDA it prints one line and ends; --dry-run takes the same way on CPU
with a tiny shape.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .apart import Apart
from .record import Environment, Record, Task, load, log, resumed, take_turns
from .tables import comparisons, markdown, roofline_share
from .training import add_files, check_files, new_record
from .work import PADDED, Stage, Work, write_first_lines, write_model

COMMAND = "python -m benchmarks.gpu"
STAGES: tuple[Stage, ...] = ("dpo", "sft")
_TITLE = "Mistral-7B's shape on one GPU"
_SMOKE = "Smoke run: one step of each, for whether it works and what memory it takes"
_DRY = "Dry run on CPU: a tiny shape, whose figures mean nothing"
# Written last, so that a model folder with it is whole.
_READY = "tokenizer_config.json"


def main(
    arguments: Sequence[str] | None = None, apart: Callable[[int, str], Any] = Apart
) -> str | None:
    """Measure both stages and return the page; None without CUDA."""
    options = _parse(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        print(f"no CUDA device here: not measured. On one: {COMMAND} --save", flush=True)
        return None
    check_files(options)
    device = "cpu" if options.dry_run else "cuda"
    size = 1 if options.dry_run else 7000
    bench = apart(options.threads, device)
    records: dict[Stage, Record] = {}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = options.scratch or Path(name)
        folder = scratch / f"model-{size}m"
        base = Work(
            side="tandem",
            stage="dpo",
            model=str(folder),
            data="",
            scratch="",
            batch_size=options.batch_size,
            threads=options.threads,
            device=device,
        )
        if not (folder / _READY).exists():
            log(f"writing a model of {size}M parameters to {folder}")
            write_model(size, options.tokenizer, folder, dtype=base.dtype, device=device)
        for stage in STAGES:
            records[stage] = _measure(bench, options, replace(base, stage=stage), Path(name))
    title = _DRY if options.dry_run else _SMOKE if options.smoke else _TITLE
    text = page(records, title)
    print(text, flush=True)
    if options.save or options.resume:
        file = options.results / f"gpu-{_name(options)}.md"
        file.write_text(text, encoding="utf-8")
    return text


def _name(options: argparse.Namespace) -> str:
    """Figures of a dry or smoke run never stand where measured ones belong."""
    return ("smoke-" if options.smoke else "") + ("dry-run" if options.dry_run else "7b")


def _measure(bench: Any, options: argparse.Namespace, base: Work, scratch: Path) -> Record:
    dpo = base.stage == "dpo"
    count = options.pairs if dpo else options.conversations
    base = replace(
        base, data=str(scratch / f"{base.stage}.jsonl"), batch_size=min(base.batch_size, count)
    )
    source = options.pairs_file if dpo else options.conversations_file
    write_first_lines(source, count, Path(base.data))
    tasks = _tasks(options, base)
    record = new_record(
        base,
        tasks,
        Environment.here(options.threads, base.device),
        model="a tiny shape" if options.dry_run else "Mistral-7B's shape",
        command=COMMAND
        + (" --smoke" if options.smoke else "")
        + (" --dry-run" if options.dry_run else ""),
    )
    file = options.results / f"gpu-{base.stage}-{_name(options)}.json"
    if options.resume:
        record = resumed(record, file)
    (runs := scratch / f"{base.stage}-runs").mkdir()
    take_turns(bench, tasks, record, runs, file if options.save or options.resume else None)
    return record


def _tasks(options: argparse.Namespace, base: Work) -> list[Task]:
    works = [base, *(replace(base, side=side) for side in ("tandem-nf4", "tandem-compiled"))]
    if options.smoke:
        return [Task(work, 1) for work in works]
    works += [replace(base, side="plain", size=size) for size in options.plain_batches]
    works += [replace(base, side="trl", size=size) for size in options.trl_batches]
    if base.stage == "sft":
        works.append(replace(base, side="trl-packed", size=options.trl_packed))
    for side, module in (("trl-liger", "liger_kernel"), ("unsloth", "unsloth")):
        if find_spec(module) is not None:
            works += [replace(base, side=side, size=size) for size in options.trl_batches]
    tasks = [Task(work, options.repeats) for work in works]
    if base.stage == "dpo":
        tasks.append(Task(replace(base, side="tandem-again"), 1))
    tasks.append(Task(replace(base, side="trl-default"), options.default_repeats))
    return tasks


def page(records: dict[Stage, Record], title: str = _TITLE) -> str:
    """The results page: what is aimed at and found, then each stage's tables."""
    lines = [
        f"# {title}",
        "",
        "Random bfloat16 weights, the recipe's LoRA, orca pairs and SlimOrca conversations at "
        f"their real lengths. `{COMMAND} --save`; with `--dry-run` the same code runs on a CPU "
        "with a tiny shape.",
        "",
        "| tandem against | reference included | in the loop | peak memory |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        found = {c.rung: c for c in comparisons(records[stage])} if stage in records else {}
        for rung, label in _ROWS[stage].items():
            one = found.get(rung)
            loop = f"{one.loop:.2f}x" if one and one.loop else "-"
            cells = [f"{one.included:.2f}x", loop, f"{one.memory:.2f}x"] if one else []
            if not cells:
                nothing = "not measured"
                cells = [nothing, nothing if stage == "dpo" else "-", nothing]
            lines.append(f"| {stage.upper()}: {label} | {' | '.join(cells)} |")
    lines += ["", *_utilisation(records)]
    for stage in STAGES:
        if stage in records:
            lines += ["", "#" + markdown(records[stage]).rstrip()]
    return "\n".join(lines) + "\n"


_ROWS: dict[Stage, dict[str, str]] = {
    "dpo": {
        "best": "TRL at its best",
        "default": "TRL, its defaults",
        "plain": "plain loop at its best",
        "padded": "plain loop, 8 padded",
        "liger": "TRL with Liger",
        "unsloth": "Unsloth",
    },
    "sft": {
        "packed": "TRL, packed",
        "best": "TRL at its best",
        "default": "TRL, its defaults",
        "plain": "plain loop at its best",
        "liger": "TRL with Liger",
        "unsloth": "Unsloth",
    },
}


def _utilisation(records: dict[Stage, Record]) -> list[str]:
    lines = [
        "| tandem | tokens/s | pairs/s | share of the bfloat16 product's rate | peak memory |",
        "|---|---|---|---|---|",
    ]
    for stage in STAGES:
        record = records.get(stage)
        ours = record.measured.get("tandem") if record else None
        if record is None or not ours or record.needed is None:
            lines.append(f"| {stage.upper()} |" + " not measured |" * 4)
            continue
        one = sorted(ours, key=lambda one: one.seconds)[len(ours) // 2]
        share, _ = roofline_share(
            record, lambda one: one.seconds, record.needed.loop + record.needed.reference
        )
        pairs = f"{one.records / one.seconds:.2f}" if stage == "dpo" else "-"
        lines.append(
            f"| {stage.upper()} | {one.tokens / one.seconds:.0f} | {pairs} | {share:.0%} | "
            f"{one.peak_bytes / 2**30:.1f} GiB |"
        )
    return lines


def write(folder: Path) -> None:
    """Make the results page again from the JSON that is there."""
    files = {stage: folder / f"gpu-{stage}-7b.json" for stage in STAGES}
    records = {stage: load(file) for stage, file in files.items() if file.exists()}
    (folder / "gpu-7b.md").write_text(page(records), encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = sys.argv[1:] if arguments is None else arguments
    dry, smoke = "--dry-run" in given, "--smoke" in given
    few = dry or smoke
    add = parser.add_argument
    add("--dry-run", action="store_true", help="a tiny shape on CPU: shows that it works")
    add("--smoke", action="store_true", help="one step of tandem, plain, in 4 bits and compiled")
    add("--repeats", type=int, default=1 if few else 3)
    add("--default-repeats", type=int, default=1)
    add("--pairs", type=int, default=8 if few else 128)
    add("--conversations", type=int, default=8 if few else 512)
    add("--batch-size", type=int, default=8 if few else 64, help="records of an optimizer step")
    add("--plain-batches", type=int, nargs="+", default=(1, PADDED) if dry else (1, 2, 4, PADDED))
    add("--trl-batches", type=int, nargs="+", default=(2,) if dry else (1, 2, 4, 8))
    add("--trl-packed", type=int, default=4096, help="TRL's packed rows")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--scratch", type=Path, help="keeps the model for a next run; a temporary folder if not")
    add("--save", action="store_true", help="also write JSON and page to --results")
    add("--resume", action="store_true", help="--save, without what the JSON already holds")
    add_files(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
