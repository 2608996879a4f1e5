"""The demo over several seeds: `python -m benchmarks.demo_seeds [--seeds 42 43 44]`.

Each seed draws its own split of the facts, its own instructions, prompts and questions. Prints
one table a seed, then mean and range, as Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

MEASURES = (
    ("completion_accuracy", "completes"),
    ("answer_accuracy", "answers right"),
    ("stop_rate", "stops"),
    ("mean_answer_tokens", "answer tokens"),
    ("loss", "held-out loss"),
    ("preference_accuracy", "preference accuracy"),
    ("preference_margin", "preference margin"),
)
MODELS = ("base", "sft", "dpo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo once per seed and print what its evaluation found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("overrides", nargs="*", help="recipe keys, such as dpo.beta=0.2")
    options = parser.parse_intermixed_args(arguments)
    found: list[Mapping[str, Any]] = []
    for seed in options.seeds:
        start = time.perf_counter()
        models = run_seed(seed, options.output / str(seed), options.overrides)
        found.append(models)
        print(f"\nseed {seed}, {time.perf_counter() - start:.0f} s\n")
        print(table([models]), flush=True)
    if len(found) > 1:
        print(f"\nmean (lowest to highest) of seeds {', '.join(map(str, options.seeds))}\n")
        print(table(found))


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> Mapping[str, Any]:
    """One run of the demo recipe; what the evaluation says of each model."""
    from tandem.pipeline.run_pipeline import run_pipeline
    from tandem.recipe.load_recipe import load_recipe

    recipe = load_recipe("demo", [f"seed={seed}", f"output_dir={folder}", *overrides])
    evaluation = run_pipeline(recipe, until=None, start=None, console=Console(stderr=True))
    if evaluation is None:
        raise SystemExit("the demo recipe was overridden to have no evaluation")
    models: Mapping[str, Any] = evaluation["models"]
    return models


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row a model; cells are means, with the range of several runs."""
    head = "| model | " + " | ".join(title for _, title in MEASURES) + " |"
    lines = [head, "| --- |" + " --- |" * len(MEASURES)]
    for model in MODELS:
        cells = [
            _cell([run[model][key] for run in runs if key in run[model]]) for key, _ in MEASURES
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
