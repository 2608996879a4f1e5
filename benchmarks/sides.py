"""One measurement in this process; `python -m benchmarks.sides JSON` prints its result as JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tandem.artifact.files import read_json
from tandem.recipe.schema import DataSource, Dpo, Lora, Sft
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.train.device import Runtime

from .plain import run_plain
from .roofline import gemm_rate
from .work import (
    ALPHA,
    BETA,
    LEARNING_RATE,
    MAX_LENGTH,
    RANK,
    SEED,
    TARGETS,
    TEMPLATE,
    Measured,
    Work,
    read_trees,
    sequence_tokens,
)


def measure(work: Work) -> Measured:
    """Do the work once and say what it cost."""
    torch.set_num_threads(work.threads)
    transformers_logging.disable_progress_bar()
    trees = read_trees(work.stage, Path(work.model), Path(work.data))
    if work.side == "tandem":
        loop, reference = _run_tandem(work)
    elif work.side == "plain":
        loop, reference = run_plain(work.stage, work.model, trees, work.batch_size)
    else:
        from .trl_side import run_trl

        tokenizer = AutoTokenizer.from_pretrained(work.model, local_files_only=True)
        loop, reference = run_trl(work, trees, tokenizer)
    return Measured(loop, reference, len(trees), sequence_tokens(trees), _peak_bytes())


def _run_tandem(work: Work) -> tuple[float, float]:
    """The stage as `tandem sft` and `tandem dpo` run it; the seconds are those of its summary."""
    common: dict[str, Any] = {
        "data": (DataSource(path=work.data),),
        "batch_size": work.batch_size,
        "epochs": 1.0,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "lora": Lora(rank=RANK, alpha=ALPHA, target_modules=TARGETS),
    }
    named: dict[str, Any] = {
        "model": work.model,
        "revision": None,
        "output_dir": Path(work.scratch) / "tandem",
        "chat_template": TEMPLATE,
        "seed": SEED,
        "runtime": Runtime(device="cpu", dtype="float32"),
        "console": Console(quiet=True),
    }
    with _own_cache(Path(work.scratch)):
        if work.stage == "dpo":
            folder = run_dpo(settings=Dpo(**common, beta=BETA), **named)
        else:
            folder = run_sft(settings=Sft(**common), **named)
    summary = read_json(folder / "summary.json")
    if work.stage == "dpo" and summary["reference_computed"] != summary["examples"]:
        raise SystemExit("reference log-probs were found in a store; the pass was not measured")
    return float(summary["train_seconds"]), float(summary["reference_seconds"])


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """An empty reference store, whatever this machine has computed before."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _peak_bytes() -> int:
    # ru_maxrss would count what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """A measurement, or the product's rate when there is no side."""
    task = json.loads(sys.argv[1])
    if "side" in task:
        result = asdict(measure(Work(**task)))
    else:
        torch.set_num_threads(task["threads"])
        result = {"gemm_rate": gemm_rate()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
