"""What a change of the code's structure must leave as it is, as one plain value.

`python -m tests.pins.pinned` writes it to `pinned.json` anew: for a change that is meant to change
it, which the commit message then says.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tandem.cli.main import main

FILE = Path(__file__).parent / "pinned.json"
COMMANDS = (
    "run", "sft", "merge", "pairs", "dpo", "sweep", "check", "show", "rehearse", "recipes",
    "plan", "eval", "chat", "report", "cache", "export", "export gguf", "export ollama",
    "export check",
)  # fmt: skip
RECIPES = ("demo", "neural-chat-7b-v3-1")
_NUMBERS = ("one", "two", "three", "four")
# The demo in a few steps, with values that are not the defaults.
SMALL = (
    "sft.epochs=null", "sft.max_steps=2", "sft.batch_size=8", "sft.data=instructions.jsonl",
    "pairs.prompts=prompts.jsonl", "pairs.heldout=[]", "pairs.max_new_tokens=8",
    "pairs.samples=2", "dpo.epochs=null", "dpo.max_steps=1", "dpo.batch_size=4",
    "evaluate.questions=questions.jsonl", "evaluate.max_new_tokens=4", "evaluate.samples=1",
)  # fmt: skip
# Inputs that hash weights which this run has trained: their bits differ between processors.
_TRAINED = {
    "2-sft-merged": ("adapter",),
    "3-pairs": ("model",),
    "4-dpo": ("model.weights", "data"),
    "5-final": ("base.weights", "adapter"),
    "6-evaluation": ("models.sft.weights", "models.dpo.weights", "pairs"),
}


def pinned(folder: Path) -> dict[str, Any]:
    """All that is pinned.

    Args:
        folder: an empty folder for the runs, which is the current one meanwhile.
    """
    with contextlib.chdir(folder), mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "c")):
        return {
            "help": {name: _said([*name.split(), "--help"]) for name in ("", *COMMANDS)},
            "dry_runs": {name: _said(["run", name, "--dry-run"]) for name in RECIPES},
            "reference": _reference(),
            "stages": _stages(),
        }


def _stages() -> dict[str, Any]:
    """The inputs of every stage of a small run, the files that each leaves, the encodings' keys."""
    data = {
        "instructions": [{"instruction": f"Say {n}.", "output": f"{n}."} for n in _NUMBERS],
        "prompts": [{"question": f"Count to {n}.", "answer": f"Yes: {n}."} for n in _NUMBERS],
        "questions": [{"question": "What is two?", "answer": "A number."}],
    }
    for name, rows in data.items():
        _write(Path(f"{name}.jsonl"), rows)
    _said(["run", "demo", "output_dir=run", *SMALL, "--until", "sft"])
    # Before the pairs, which trained weights write.
    encodings = sorted(path.name for path in Path("c/tandem/encoded").iterdir() if path.is_dir())
    _said(["run", "demo", "output_dir=run", *SMALL])
    stages = {}
    for path in sorted(Path("run").glob("*/manifest.json")):
        inputs = json.loads(path.read_text())["inputs"]
        for key in _TRAINED.get(path.parent.name, ()):
            *outer, last = key.split(".")
            holder = inputs
            for name in outer:
                holder = holder[name]
            holder[last] = "of trained weights"
        files = [p for p in path.parent.rglob("*") if p.is_file() and p.parent.name != "scores"]
        stages[path.parent.name] = {
            "inputs": inputs,
            "files": sorted(str(p.relative_to(path.parent)) for p in files),
        }
    return {"folders": stages, "encodings": encodings}


def _reference() -> dict[str, Any]:
    """The keys of a few pairs' reference log-probs, and the numerics that they belong to."""
    pairs = [{"prompt": f"Say {n}.", "chosen": n, "rejected": "No."} for n in _NUMBERS]
    _write(Path("pairs.jsonl"), pairs)
    flags = ["--model_name_or_path", "demo:base", "--dataset_name", "pairs.jsonl"]
    flags += ["--output_dir", "dpo", "--max_steps", "1", "--batch_size", "2"]
    flags += ["--chat_template", "neural-chat", "--device", "cpu", "--dtype", "float32"]
    _said(["dpo", *flags, "--max_length", "256"])
    manifest = json.loads(Path("dpo/manifest.json").read_text())
    with contextlib.closing(sqlite3.connect(Path("c/tandem/reference.sqlite"))) as store:
        keys = sorted(row[0].hex() for row in store.execute("SELECT key FROM checked"))
    schedule = manifest["schedule"]
    return {
        "inputs": manifest["inputs"],
        "numerics": {key: schedule[key] for key in ("kernels", "attention", "device")},
        "keys": keys,
    }


def _said(args: list[str]) -> list[str]:
    """The lines of a command's standard output, with single spaces."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(out):
        code = main(args)
    assert code == 0, args
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps(pinned(Path(scratch)), indent=1) + "\n")
