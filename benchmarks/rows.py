"""Whole rows of scored answers against a tree a pair and TRL: `python -m benchmarks.rows --help`.

Each prompt has four answers with different scores, so that a row has six pairs. Three sides train
on all of them, in one optimizer step: tandem with a row as one record (`completions: all_pairs`),
tandem with every pair as a record, and TRL, best configured, with the same pairs. Rows are made of
real texts: a prompt with its own two answers and two of the record behind it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .apart import Apart
from .record import Environment
from .tables import RESULTS
from .training import SHARED
from .work import Measured, Work, read_trees, source_of, write_model

_SCORES = (9.0, 7.0, 4.0, 2.0)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the page, and return it."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = Path(name)
        model = scratch / "model"
        write_model(options.size, SHARED / "tokenizers" / "mistral_v1_32000", model)
        rows = rows_of(SHARED / "pairs" / "orca_dpo_pairs.jsonl", options.rows)
        files = write(rows, scratch)
        works = _works(options, model, files, scratch)
        measured = _measure(works, options)
        fed = {side: _fed(work) for side, work in works.items()}
    page = _page(options, measured, fed)
    print(page, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "rows.md").write_text(page, encoding="utf-8")
    return page


def rows_of(source: Path, count: int) -> list[dict[str, Any]]:
    """Rows in UltraFeedback's layout, each with four different answers."""
    with source.open(encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(count + 1)]
    rows = []
    for own, other in pairwise(records):
        answers = (own["chosen"], other["chosen"], own["rejected"], other["rejected"])
        completions = [
            {"response": answer, "overall_score": score}
            for answer, score in zip(answers, _SCORES, strict=True)
        ]
        rows.append({"instruction": own["question"], "completions": completions})
    return rows


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """The rows as one file, and all their pairs as another."""
    files = {name: folder / f"{name}.jsonl" for name in ("rows", "pairs")}
    pairs = [
        {
            "question": row["instruction"],
            "chosen": better["response"],
            "rejected": worse["response"],
        }
        for row in rows
        for better, worse in combinations(row["completions"], 2)
    ]
    for name, records in (("rows", rows), ("pairs", pairs)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files[name].write_text(text, encoding="utf-8")
    return files


def _works(
    options: argparse.Namespace, model: Path, files: Mapping[str, Path], scratch: Path
) -> dict[str, Work]:
    pairs = options.rows * len(list(combinations(_SCORES, 2)))
    sides = {"tandem-rows": ("rows", options.rows), "tandem": ("pairs", pairs)}
    if not options.without_trl:
        sides["trl"] = ("pairs", pairs)
    return {
        side: Work(
            side, "dpo", str(model), str(files[data]), str(scratch / "out"), batch,
            options.threads, size=1 if side == "trl" else 0,
        )
        for side, (data, batch) in sides.items()
    }  # fmt: skip


def _measure(works: Mapping[str, Work], options: argparse.Namespace) -> dict[str, list[Measured]]:
    """All sides in turns, each time in a process and a folder of its own."""
    apart = Apart(options.threads)
    measured: dict[str, list[Measured]] = {side: [] for side in works}
    for repeat in range(options.repeats):
        for side, work in works.items():
            scratch = Path(f"{work.scratch}-{side}-{repeat}")
            scratch.mkdir()
            given = Work(**work.as_dict() | {"scratch": str(scratch)})
            measured[side].append(apart.measure(given))
    losses = {side: results[0].first_loss for side, results in measured.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the sides computed other losses: {losses}")
    return measured


def _fed(work: Work) -> int:
    """Tokens that an epoch feeds."""
    trees = read_trees("dpo", Path(work.model), source_of(work))
    if work.side == "trl":
        return sum(len(tree.sequence(i).input_ids) for tree in trees for i in (0, 1))
    return sum(tree.fed for tree in trees)


def _page(
    options: argparse.Namespace,
    measured: Mapping[str, Sequence[Measured]],
    fed: Mapping[str, int],
) -> str:
    here, pairs = Environment.here(options.threads), options.rows * 6
    seconds = {side: median(one.seconds for one in all_) for side, all_ in measured.items()}
    first = measured["tandem-rows"][0]
    lines = [
        "# Whole rows of four answers, and their pairs apart",
        "",
        f"Made by `python -m benchmarks.rows --rows {options.rows} --size {options.size} --repeats "
        f"{options.repeats} --save`. {options.rows} prompts with four answers, "
        f"{pairs} pairs, one optimizer step; a Mistral architecture of {options.size} million "
        f"parameters, float32. Medians of {options.repeats} runs in turns; the reference pass "
        f"counts. All sides had a first loss of {first.first_loss:.4f}.",
        "",
        "| side | tokens fed | reference | steps | together | against whole rows | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side, results in measured.items():
        reference, loop = (
            median(getattr(one, f"{name}_seconds") for one in results)
            for name in ("reference", "loop")
        )
        peak = median(one.peak_bytes for one in results) / 1e6
        lines.append(
            f"| {Work(side, 'dpo', '', '', '', 1, 1, size=1).name} | {fed[side]:,} | "
            f"{reference:.1f} s | {loop:.1f} s | {seconds[side]:.1f} s | "
            f"{seconds[side] / seconds['tandem-rows']:.2f}x | {peak:,.0f} MB |"
        )
    lines += ["", f"{here.processor}, {here.threads} threads; {here.versions}.", ""]
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=4, help="prompts")
    parser.add_argument("--size", type=int, default=60, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rows.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
