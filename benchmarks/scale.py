"""A million records through encode, plan and check: `python -m benchmarks.scale --help`.

Conversations are made up, the same in every run: answers of a line to several pages, no two alike,
one in a hundred beyond the limit and one in a hundred without an answer. Each command runs in a
process of its own, its result kept in a cache that begins empty. Memory is that of the whole
process tree, shared pages counted once, and must stay below 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .apart import ROOT
from .encoding import tree_memory
from .record import Environment, log
from .tables import RESULTS
from .training import SHARED
from .work import TEMPLATE

LIMIT_BYTES = 2 * 10**9
SECOND_START_SECONDS = 5.0
_FORMATS = ("jsonl", "parquet")
_EVERY_SECONDS = 0.2
_ROWS = 20_000
_SENTENCES = 5_000
# One record in so many is beyond the limit, and one has no answer.
_RARE = 100
# Made-up words: two to four of these.
_SYLLABLES = ("ba", "den", "fi", "gor", "hu", "jal", "kem", "li", "mor", "na", "pel", "qui", "ru",
              "sta", "ter", "vo", "wen", "za")  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One command: what it was, its seconds, the most memory its processes held, what it said."""

    name: str
    seconds: float
    peak: int
    said: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the table, and return it."""
    options = _parse(arguments)
    if not options.tokenizer.exists():
        raise SystemExit(
            f"{options.tokenizer} is not here. The benchmark needs the data beside the repository, "
            "or name another folder with --tokenizer."
        )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        model = _write_model(scratch / "model", options.tokenizer)
        found = {}
        for form in options.formats:
            data = scratch / f"data.{form}"
            log(f"writing {options.records} records as {form}")
            write_records(options.records, data)
            size = data.stat().st_size
            found[form] = (size, _measure(data, model, scratch))
            data.unlink()
            shutil.rmtree(scratch / "cache", ignore_errors=True)
    table = page(options, found)
    print(table, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scale.md").write_text(table, encoding="utf-8")
    return table


def records(count: int) -> Iterator[dict[str, Any]]:
    """ShareGPT records of varied lengths, the same in every run."""
    draw = random.Random(5)
    sentences = [_sentence(draw) for _ in range(_SENTENCES)]
    for number in range(count):
        kind = draw.randrange(_RARE)
        length = 1 + int(draw.expovariate(1 / 12)) if kind else 400
        answer = "" if kind == 1 else " ".join(draw.choices(sentences, k=length))
        asked = " ".join(draw.choices(sentences, k=1 + int(draw.expovariate(1 / 3))))
        yield {
            "conversations": [
                {"from": "human", "value": f"Question {number}: {asked}"},
                {"from": "gpt", "value": answer},
            ]
        }


def write_records(count: int, target: Path) -> None:
    """`records` as JSON lines or Parquet."""
    rows = records(count)
    if target.suffix == ".jsonl":
        with target.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
        return
    import pyarrow
    import pyarrow.parquet

    writer = None
    while some := list(islice(rows, _ROWS)):
        table = pyarrow.Table.from_pylist(some)
        writer = writer or pyarrow.parquet.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def page(options: argparse.Namespace, found: dict[str, tuple[int, list[Ran]]]) -> str:
    """The results as a page."""
    formats = " ".join(found)
    lines = [
        f"# {options.records} records",
        "",
        f"`python -m benchmarks.scale --records {options.records} --formats {formats}`. Made-up "
        "conversations, one in a hundred truncated and one dropped. Seconds are those of the whole "
        "command; of an encode, imports are apart.",
        "",
        "| | seconds | memory of all its processes | below 2 GB |",
        "|---|---|---|---|",
    ]
    for form, (size, runs) in found.items():
        lines.append(f"| **{form}, {size / 1e9:.2f} GB** | | | |")
        for ran in runs:
            below = "yes" if ran.peak < LIMIT_BYTES else "**no**"
            lines.append(f"| {_named(ran)} | {_seconds(ran)} | {ran.peak / 1e6:.0f} MB | {below} |")
    environment = Environment.here(options.cores)
    lines += ["", *_verdicts(found), ""]
    lines.append(f"{environment.processor}, cores: {options.cores}. {environment.versions}.")
    return "\n".join(lines) + "\n"


def _named(ran: Ran) -> str:
    if "records" not in ran.said:
        return ran.name
    return f"{ran.name} ({ran.said['records']} records, {ran.said['tokens']} tokens)"


def _seconds(ran: Ran) -> str:
    inner = ran.said.get("seconds")
    return (
        f"{ran.seconds:.1f}"
        if inner is None
        else f"{inner:.1f} (imports {ran.seconds - inner:.1f})"
    )


def _verdicts(found: dict[str, tuple[int, list[Ran]]]) -> list[str]:
    """What was demanded and did not come true."""
    missed = [
        f"{form}: {ran.name} held {ran.peak / 1e9:.2f} GB, more than 2"
        for form, (_, runs) in found.items()
        for ran in runs
        if ran.peak >= LIMIT_BYTES
    ]
    missed += [
        f"{form}: the second start took {ran.said['seconds']:.1f} s beyond imports, more than 5"
        for form, (_, runs) in found.items()
        for ran in runs
        if ran.name == "second start" and ran.said["seconds"] >= SECOND_START_SECONDS
    ]
    return missed or ["All stayed below 2 GB, and second starts below 5 seconds beyond imports."]


def _measure(data: Path, model: Path, scratch: Path) -> list[Ran]:
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        f"name: scale\nmodel: {model}\noutput_dir: {scratch / 'out'}\nchat_template: {TEMPLATE}\n"
        f"device: cpu\nsft:\n  data: {data}\n  max_length: 2560\n  max_prompt_length: 1024\n"
    )
    task = {"side": "tandem", "kind": "conversations", "data": str(data), "tokenizer": str(model)}
    encode = [sys.executable, "-m", "benchmarks.encoding_side", json.dumps(task)]
    tandem = [sys.executable, "-m", "tandem"]
    commands = {
        "encode": encode,
        "second start": encode,
        "plan": [*tandem, "plan", str(recipe), "--json"],
        "check": [*tandem, "check", str(data), "--recipe", str(recipe), "--json"],
    }
    return [run(name, command, scratch / "cache") for name, command in commands.items()]


def run(name: str, command: list[str], cache: Path) -> Ran:
    """Run a command in a new process and watch its memory; what it prints is one JSON value.

    Raises SystemExit with its last words when it fails; exit code 2 is a finding of `check`.
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(_EVERY_SECONDS)
        seconds = time.perf_counter() - began
        if process.returncode not in ((0, 2) if name == "check" else (0,)):
            errors.seek(0)
            raise SystemExit(f"{name} failed:\n{errors.read()[-4000:]}")
        output.seek(0)
        text = output.read()
    said = json.loads(text.splitlines()[-1]) if "encoding_side" in " ".join(command) else {}
    log(f"{name}: {seconds:.1f} s, {peak / 1e6:.0f} MB")
    return Ran(name, seconds, peak, said)


def _sentence(draw: random.Random) -> str:
    words = [
        "".join(draw.choices(_SYLLABLES, k=draw.randrange(2, 5)))
        for _ in range(draw.randrange(4, 12))
    ]
    return " ".join(words).capitalize() + "."


def _write_model(folder: Path, tokenizer: Path) -> Path:
    """A model folder without weights, which is all that encode, plan and check read."""
    from transformers import AutoTokenizer, MistralConfig

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    loaded.save_pretrained(folder)
    MistralConfig(
        vocab_size=len(loaded), hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--records", type=int, default=1_000_000)
    add("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS))
    add("--tokenizer", type=Path, default=SHARED / "tokenizers" / "mistral_v1_32000")
    add("--scratch", type=Path, help="where the generated data and the cache are put meanwhile")
    add("--save", action="store_true", help="also write benchmarks/results/scale.md")
    options = parser.parse_args(arguments)
    options.cores = len(os.sched_getaffinity(0))
    return options


if __name__ == "__main__":
    main()
