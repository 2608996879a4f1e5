"""One measurement in this process; `python -m benchmarks.sides JSON` prints its result as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tandem.data.encoded.example import Example
from tandem.recipe.choices import DeviceName
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.runtime.host_memory import most_resident
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl

from .plain import run_plain
from .roofline import gemm_rates
from .work import (
    ADAPTERS,
    BETA,
    CHOSEN_WEIGHT,
    LEARNING_RATE,
    MAX_LENGTH,
    SEED,
    TEMPLATE,
    Measured,
    Ran,
    Work,
    in_training_order,
    read_trees,
    sequence_tokens,
    source_of,
    trained_tokens,
)


def measure(work: Work) -> Measured:
    """Do the work once and say what it cost."""
    torch.set_num_threads(work.threads)
    transformers_logging.disable_progress_bar()
    trees = in_training_order(read_trees(work.stage, Path(work.model), source_of(work)), work)
    if work.side.startswith("tandem"):
        ran = _run_tandem(work, trees)
    elif work.side == "plain":
        ran = run_plain(work, trees)
    else:
        from .trl_side import run_trl

        tokenizer = AutoTokenizer.from_pretrained(work.model, local_files_only=True)
        ran = run_trl(work, trees, tokenizer)
    return Measured(
        **asdict(ran),
        records=len(trees),
        tokens=sequence_tokens(trees),
        peak_bytes=_peak_bytes(work.device),
    )


def _run_tandem(work: Work, trees: list[Example]) -> Ran:
    """The stage as `tandem sft` and `tandem dpo` run it; the seconds are those of its summary."""
    assert not work.records, "tandem's stages take the whole file"
    computed = len(trees)
    with _own_cache(Path(work.scratch)):
        if work.side == "tandem-again":
            # Another learning rate and one step: the reference pass is the same.
            _stage(work, "before", max_steps=1, learning_rate=LEARNING_RATE / 2)
            computed = 0
        folder = _stage(work, "tandem", epochs=1.0, learning_rate=LEARNING_RATE)
    summary = read_json(folder / "summary.json")
    if work.stage == "dpo" and summary["reference_computed"] != computed:
        raise SystemExit(
            f"{summary['reference_computed']} reference log-probs were computed, not {computed}: "
            "the table would not say what was measured"
        )
    first = read_jsonl(folder / "metrics.jsonl")[0]
    count = min(work.batch_size, len(trees))
    logp = -float(first["loss"])
    if work.stage == "dpo" and work.side != "tandem-rows":
        answers = CHOSEN_WEIGHT * first["logps/chosen"] + first["logps/rejected"]
        logp = answers * count / trained_tokens(trees[:count])
    return Ran(
        loop_seconds=float(summary["train_seconds"]),
        reference_seconds=float(summary["reference_seconds"]),
        # Weights that were rounded to 4 bits give log-probs of their own.
        first_records=0 if work.side in ("tandem-nf4", "tandem-rows") else count,
        first_loss=float(first["loss"]),
        first_logp=logp,
        bfloat16=work.device == "cuda",
    )


def _stage(work: Work, name: str, **steps: Any) -> Path:
    adapter = ADAPTERS[work.stage]
    common: dict[str, Any] = {
        "data": (source_of(work),),
        "batch_size": work.batch_size,
        "max_length": MAX_LENGTH,
        # The first step's metrics are compared with the peers'.
        "logging_steps": 1,
        "lora": LoraSettings(
            rank=adapter.rank, alpha=adapter.alpha, target_modules=adapter.targets
        ),
        **steps,
    }
    run = RunSettings(
        model=work.model,
        output_dir=str(Path(work.scratch) / name),
        chat_template=TEMPLATE,
        seed=SEED,
        device=cast("DeviceName", work.device),
        quantization="nf4" if work.side == "tandem-nf4" else None,
        compile=work.side == "tandem-compiled",
    )
    console = Console(quiet=True)
    if work.stage == "dpo":
        return run_dpo(TrainingJob(run, DpoSettings(**common, beta=BETA)), console)
    return run_sft(TrainingJob(run, SftSettings(**common)), console)


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


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return most_resident()


def main() -> None:
    """A measurement, or the product's rates when there is no side."""
    task = json.loads(sys.argv[1])
    if "side" in task:
        result = asdict(measure(Work(**task)))
    else:
        torch.set_num_threads(task["threads"])
        result = gemm_rates(task["device"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
