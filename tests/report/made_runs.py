"""Run folders as the stages write them, with made-up but plausible figures."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

VERSIONS = {"tandem": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"}
RECIPE = """\
name: demo
description: A tiny model that knows facts learns to answer questions about them.
model: demo:base
output_dir: runs/demo
chat_template: neural-chat
seed: 42
sft:
  data:
  - path: demo:instructions
  batch_size: 16
  epochs: 3
  optimizer: lion
  learning_rate: 0.001
  max_length: 128
  max_prompt_length: 96
  lora: {rank: 16, alpha: 64.0, dropout: 0.05, target_modules: [q_proj, k_proj]}
pairs:
  prompts:
  - path: demo:prompts
dpo:
  batch_size: 16
  max_steps: 60
  learning_rate: 0.0005
  beta: 0.1
  max_length: 128
evaluate:
  questions:
  - path: demo:questions
"""
NASTY = "<script>alert('x')</script> & \"quotes\" [bold]not markup[/bold]"


def digest(text: str) -> str:
    """Something that looks like a SHA-256."""
    return f"{abs(hash_of(text)):064x}"[-64:]


def hash_of(text: str) -> int:
    return random.Random(text).getrandbits(256)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, values: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")


def manifest(
    stage: str, inputs: dict[str, Any], outputs: list[str], *, finished: bool = True
) -> Any:
    return {
        "stage": stage,
        "status": "finished" if finished else "running",
        "inputs": inputs,
        "inputs_hash": digest(stage),
        "schedule": {"base": "demo:base", "tokens_per_microbatch": 4096, "threads": 2},
        "versions": VERSIONS,
        "outputs": {name: digest(stage + name) for name in outputs} if finished else {},
        "started_at": "2026-01-05T10:00:00+00:00",
        "finished_at": "2026-01-05T10:01:32+00:00" if finished else None,
    }


def scores() -> list[dict[str, Any]]:
    """Held-out scores that get worse in the end."""
    return [
        {"step": step, "epoch": step / 40, "eval_loss": loss, "eval_seconds": 0.5}
        for step, loss in ((0, 3.61), (40, 0.71), (80, 0.52), (120, 0.58))
    ]


def sft_stage(
    folder: Path, *, steps: int = 120, finished: bool = True, scored: bool = False
) -> None:
    """A folder of supervised fine-tuning."""
    rng = random.Random(1)
    rows = []
    for step in range(1, steps + 1):
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows.append(
            {
                "step": step, "epoch": 3 * step / steps, "learning_rate": rate,
                "loss": 0.35 + 3.2 * math.exp(-step / 18) + rng.gauss(0, 0.05),
                "grad_norm": 0.8 + 2 * math.exp(-step / 10) + abs(rng.gauss(0, 0.15)),
                "step_seconds": 0.21, "tokens": 1180, "examples": 16,
                "tokens_per_second": 5600 + rng.gauss(0, 260), "memory_bytes": 7.1e8 + step * 3e5,
            }
        )  # fmt: skip
    inputs = {
        "model": {"weights": digest("base"), "config": digest("config")},
        "chat_template": {"name": "neural-chat", "hash": digest("template")},
        "data": [{"files": digest("data"), "split": "train", "subset": None}],
        "settings": {"max_length": 128, "max_prompt_length": 96, "learning_rate": 1e-3},
    }  # fmt: skip
    write(
        folder / "manifest.json",
        manifest("sft", inputs, ["adapter_model.safetensors"], finished=finished),
    )
    write_lines(folder / "metrics.jsonl", rows)
    if scored:
        write_lines(folder / "validation.jsonl", scores())
    if not finished:
        return
    lengths = [max(14, round(rng.lognormvariate(4.1, 0.35))) for _ in range(640)]
    write(
        folder / "summary.json",
        {
            "train_seconds": 25.4, "reference_seconds": 0.0, "examples": 1920, "tokens": 141_600,
            "padded_tokens": 243_800, "shared_tokens": 0, "steps": steps,
            "peak_memory_bytes": 812_646_400, "warnings": [], "attention": "segments",
            "device": "cpu", "dtype": "float32", "fill": 0.874, "imbalance": 1.023,
            "processes": 2, "engine": "deepspeed-zero2",
            "estimate": {"seconds": {"estimated": 20.0, "actual": 25.4}, "memory": {}},
            "lengths": {"sequence": lengths, "prompt": [round(n * 0.6) for n in lengths]},
            **(_scored_summary() if scored else {}),
            "ledger": {
                "read": 652, "trained": 640, "truncated": 9, "dropped": 12,
                "reasons": {"answer cut at max_length": 9, "no assistant turn <b>": 12},
            },
        },
    )  # fmt: skip
    ledger = [
        {"file": "instructions.jsonl", "row": 31 * i, "outcome": "dropped",
         "reason": "no assistant turn <b>", "detail": ""}
        for i in range(1, 13)
    ]  # fmt: skip
    write_lines(folder / "data-ledger.jsonl", ledger)


def _scored_summary() -> dict[str, Any]:
    lines = scores()
    return {
        "validation": {"records": 80, "shared_prompts": 0, "first": lines[0], "last": lines[-1]},
        "kept_step": 80,
        "best_metric": "loss",
        "early_stopping": {"step": 120, "of": 400, "best_step": 80, "reason": "early stopping"},
    }


def dpo_stage(folder: Path, *, steps: int = 60, fall: float = 0.4) -> None:
    """A folder of preference optimization; `fall` nats of chosen log-prob are lost."""
    rng = random.Random(2)
    rows = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-step / 20)
        margin = 2.6 * done + rng.gauss(0, 0.12)
        chosen = -12.0 - fall * done + rng.gauss(0, 0.15)
        rows.append(
            {
                "step": step, "epoch": step / steps,
                "loss": 0.693 - 0.55 * done + rng.gauss(0, 0.02),
                "grad_norm": 1.4 - done + abs(rng.gauss(0, 0.1)),
                "learning_rate": 5e-4 * min(1.0, step / 6) * (1 - step / (steps + 1)),
                "rewards/chosen": -0.1 * fall * done,
                "rewards/rejected": -0.1 * fall * done - margin,
                "rewards/margins": margin, "rewards/accuracies": min(1.0, 0.55 + 0.43 * done),
                "logps/chosen": chosen, "logps/rejected": -14.0 - 26 * done + rng.gauss(0, 0.5),
                "step_seconds": 0.3, "tokens": 1610, "examples": 16,
                "tokens_per_second": 5100 + rng.gauss(0, 200), "memory_bytes": 8.3e8,
            }
        )  # fmt: skip
    inputs = {
        "model": "../2-sft-merged",
        "data": {"pairs.jsonl": digest("pairs")},
        "beta": 0.1,
        "max_length": 128,
    }
    write(folder / "manifest.json", manifest("dpo", inputs, ["adapter_model.safetensors"]))
    write_lines(folder / "metrics.jsonl", rows)
    lengths = [round(rng.uniform(40, 126)) for _ in range(640)]
    write(
        folder / "summary.json",
        {
            "train_seconds": 18.9, "reference_seconds": 2.1, "examples": 960, "tokens": 96_600,
            "padded_tokens": 188_000, "shared_tokens": 41_200, "steps": steps,
            "peak_memory_bytes": 912_646_400, "warnings": [], "attention": "segments",
            "device": "cpu", "dtype": "float32",
            "lengths": {"sequence": lengths, "prompt": [n // 2 for n in lengths]},
            "ledger": {"read": 320, "trained": 320, "truncated": 0, "dropped": 0, "reasons": {}},
        },
    )  # fmt: skip


def evaluation() -> dict[str, Any]:
    """evaluation.json of a run that went well."""
    question = "What is the chemical symbol of gold?"
    return {
        "models": {
            "base": {
                "path": "demo:base", "answer_accuracy": 0.017, "completion_accuracy": 0.958,
                "loss": 2.914, "preference_accuracy": 0.512, "preference_margin": 0.21,
                "stop_rate": 0.0, "mean_answer_tokens": 64.0,
            },
            "sft": {
                "path": "runs/demo/2-sft-merged", "answer_accuracy": 0.825, "loss": 0.412,
                "preference_accuracy": 0.661, "preference_margin": 3.4, "stop_rate": 0.992,
                "mean_answer_tokens": 13.2,
            },
            "dpo": {
                "path": "runs/demo/5-final", "answer_accuracy": 0.842, "loss": 0.455,
                "preference_accuracy": 0.934, "preference_margin": 21.7, "stop_rate": 1.0,
                "mean_answer_tokens": 11.9,
            },
        },
        "counts": {"questions": 120, "pairs": 96},
        "samples": [
            {
                "prompt": question, "expected": "The chemical symbol of gold is Au.",
                "answers": {
                    "base": " The capital of France is Paris. Water boils at 100 degrees. " * 3,
                    "sft": "The chemical symbol of gold is Au.",
                    "dpo": "The chemical symbol of gold is Au.",
                },
            },
            {
                "prompt": f"Which is it? {NASTY}", "expected": NASTY,
                "answers": {"base": "", "sft": NASTY, "dpo": "A fox."},
            },
        ],
    }  # fmt: skip


def measured_evaluation() -> dict[str, Any]:
    """evaluation.json with tasks, standard errors and differences."""
    found = evaluation()
    for name, score in (("base", 0.4), ("sft", 0.46), ("dpo", 0.465)):
        model = found["models"][name]
        model["task:arc_easy"] = score
        model["errors"] = {"task:arc_easy": 0.02, "loss": 0.011}
    found["models"]["sft"]["differences"] = {
        "task:arc_easy": {"first": [0.06, 0.01], "previous": [0.06, 0.01]},
        "loss": {"first": [-2.5, 0.02], "previous": [-2.5, 0.02]},
    }
    found["models"]["dpo"]["differences"] = {
        "task:arc_easy": {"first": [0.065, 0.012], "previous": [0.005, 0.004]}
    }
    found["tasks"] = [
        {
            "task": "arc_easy", "title": "ARC-easy", "metric": "acc_norm,none", "shots": 5,
            "items": 500, "limit": 500, "chat": False, "version": "1.0",
            "notes": [f"local data: {NASTY}"], "cut": {"base": 0, "sft": 3},
        }
    ]  # fmt: skip
    found["left_out"] = [["MMLU", "no such files"]]
    return found


def hashed(folder: Path) -> Path:
    """Put the hashes of the files that are there into the manifests of a run's stages."""
    for path in folder.rglob("manifest.json"):
        value = json.loads(path.read_text())
        for name in value.get("outputs", {}):
            if (path.parent / name).is_file():
                content = (path.parent / name).read_bytes()
                value["outputs"][name] = hashlib.sha256(content).hexdigest()
        write(path, value)
    return folder


def run_folder(folder: Path, *, until: str = "evaluation", fall: float = 0.4) -> Path:
    """A run; `until` sft stops after the first stage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    sft_stage(folder / "1-sft")
    if until == "sft":
        return hashed(folder)
    for name in ("2-sft-merged", "5-final"):
        write(
            folder / name / "manifest.json",
            manifest("merge", {"adapter": digest(name)}, ["model.safetensors"]),
        )
        write(folder / name / "summary.json", {"max_logprob_difference": 3.1e-6, "probes": 4})
    write(
        folder / "3-pairs" / "manifest.json",
        manifest("pairs", {"prompts": digest("p")}, ["pairs.jsonl"]),
    )
    write(
        folder / "3-pairs" / "summary.json",
        {"prompts": 400, "generated": 800, "kept": 320, "seconds": 31.0,
         "dropped": {"same as chosen": 398, "empty": 82}},
    )  # fmt: skip
    pair = {"system": "",
            "question": "How many legs has a spider?", "chosen": "A spider has eight legs.",
            "rejected": f"A spider has six legs. {NASTY}"}  # fmt: skip
    write_lines(folder / "3-pairs" / "pairs.jsonl", [pair] * 3)
    dpo_stage(folder / "4-dpo", fall=fall)
    write(
        folder / "6-evaluation" / "manifest.json",
        manifest("evaluate", {"questions": digest("q")}, ["evaluation.json"]),
    )
    write(folder / "6-evaluation" / "evaluation.json", evaluation())
    return hashed(folder)
