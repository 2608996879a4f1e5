"""Stages that are watched, each in this process or in several under torchrun.

As a script it takes a folder with `orders.json` and leaves, for each rank, how each order ended.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.errors import TandemError
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.samples_settings import SamplesSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings, ValidationSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tests.jobs import training_job

WATCH = """\
import os


def told(event):
    with (event.folder / "told.txt").open("a") as file:
        file.write(f"{os.environ.get('RANK', '0')} {event.kind} {event.step}\\n")


def enough(event):
    return "stop" if event.kind == "step" and event.step == 2 else None


def broken(event):
    if event.kind == "step" and event.step == 2:
        raise RuntimeError("broken on purpose")
"""


@dataclass(frozen=True)
class Watched:
    """A stage on two data sets, and what watches it."""

    folder: str
    kind: str = "sft"
    engine: str = "auto"
    samples: bool = True
    callbacks: tuple[str, ...] = ()
    full: bool = False
    trackers: tuple[str, ...] = ()


def watch(order: Watched, home: Path) -> dict[str, Any]:
    """Carry an order out; how it ended."""
    os.environ["XDG_CACHE_HOME"] = str(home / f"{order.folder}.cache")
    sources = tuple(DataSource(path=str(home / f"{order.kind}-{n}.jsonl")) for n in "ab")
    values: dict[str, Any] = {
        "data": sources, "validation": ValidationSettings(data=sources, steps=3),
        "batch_size": 6, "max_steps": 3, "learning_rate": 1e-2, "max_length": 128,
        "logging_steps": 1, "save_steps": 3,
        **({"full": True, "adam_epsilon": 1e-4} if order.full else
           {"lora": LoraSettings(rank=4, alpha=8, dropout=0.0)}),
    }  # fmt: skip
    if order.samples:
        prompts = ("say red", "say sun and moon")
        values["samples"] = SamplesSettings(prompts=prompts, max_new_tokens=8)
    settings = SftSettings(**values) if order.kind == "sft" else DpoSettings(**values)
    job = training_job(
        settings, home / "model", home / order.folder, engine=order.engine,
        callbacks=order.callbacks, trackers=order.trackers,
    )  # fmt: skip
    stage = run_sft if order.kind == "sft" else run_dpo
    try:
        stage(job, Console(quiet=True), default_callbacks(job.run))
    except TandemError as error:
        return {"error": str(error), "code": error.exit_code, "reported": error.reported}
    return {}


def as_json(orders: tuple[Watched, ...]) -> str:
    """What the script reads."""
    return json.dumps([asdict(order) for order in orders])


if __name__ == "__main__":
    home = Path(sys.argv[1])
    os.chdir(home)  # where the functions are
    orders = [
        Watched(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})
        for one in json.loads((home / "orders.json").read_text())
    ]
    ended = [watch(order, home) for order in orders]
    (home / f"ended.rank{os.environ['RANK']}.json").write_text(json.dumps(ended))
