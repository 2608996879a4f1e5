"""Stage 2: Direct Preference Optimization of a LoRA adapter on preference pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.build_dataset import prepare_pairs
from tandem.errors import UserError
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import DpoSettings
from tandem.result_warnings import chosen_collapse
from tandem.runtime.console import log, phase
from tandem.stages.training.context import Made, StageKind, Start
from tandem.stages.training.train_stage import run_training
from tandem.storage.hashing import hash_json
from tandem.train.losses.objectives import PreferenceObjective
from tandem.train.reference_logps import ReferenceStore, reference_logps

# Changes whenever the same weights and tokens would give another stored number.
_NUMERICS = "sums in float64, products of oneDNN, vocabulary in blocks"
# Relative differences of log-probs that a dtype explains, of sums over whole answers.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def run_dpo(
    *,
    model: str,
    revision: str | None,
    settings: DpoSettings,
    output_dir: Path,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    console: Console,
    added_tokens: Sequence[str] = (),
) -> Path:
    """Align `model`, usually the merged SFT model, with preference pairs.

    The reference is the model itself with the adapter off; its log-probs are computed before the
    first step or found in the store. See `training.run_training` for the rest.
    """

    def objective(start: Start) -> Made:
        return _objective(start, settings.beta)

    def warnings(metrics: list[dict[str, Any]]) -> list[str]:
        return _warnings(metrics, settings.beta)

    return run_training(
        StageKind("dpo", prepare_pairs, objective, dropout=False, warnings=warnings),
        model=model,
        revision=revision,
        settings=settings,
        output_dir=output_dir,
        chat_template=chat_template,
        seed=seed,
        runtime=runtime,
        console=console,
        added_tokens=added_tokens,
    )


def _objective(start: Start, beta: float) -> Made:
    began = time.perf_counter()
    device = start.engine.device
    dtype = device.dtype_name
    identity = hash_json(
        {
            "numerics": _NUMERICS,
            "model": start.model_hash,
            "dtype": dtype,
            "attention": start.backend,
            "device": device.kind,
            "kernels": start.numerics,
        }
    )
    processes = start.engine.processes
    store = ReferenceStore(lambda text: log(start.console, f"dpo: {text}"))
    without = start.weights.reference(start.model)
    if without is None:
        raise UserError(
            "dpo: the model that is trained cannot be its own reference with these weights, and a "
            "second model is not supported"
        )
    with (
        without,
        phase(start.console, "reference log-probs", len(start.dataset)) as advance,
    ):
        reference, computed = reference_logps(
            start.engine,
            start.dataset,
            store=store,
            identity=identity,
            budget=start.budget,
            advance=advance,
        )
    processes.on_rank0(store.prune)
    seconds = time.perf_counter() - began
    log(
        start.console,
        f"dpo: reference log-probs of {len(start.dataset)} {start.what}pairs, {computed} computed "
        f"and {len(start.dataset) - computed} found in the store, {seconds:.1f} s",
    )
    objective = PreferenceObjective(reference, beta=beta, relative_tolerance=_TOLERANCE[dtype])
    return Made(objective, seconds, computed)


def _warnings(metrics: list[dict[str, Any]], beta: float) -> list[str]:
    if not metrics:
        return []
    last = metrics[-max(1, math.ceil(len(metrics) / 4)) :]
    mean = {key: sum(line[key] for line in last) / len(last) for key in metrics[0]}
    collapse = chosen_collapse(metrics, beta)
    found = [] if collapse is None else [collapse]
    if mean["rewards/accuracies"] < 0.5 and mean["rewards/margins"] < 0:
        found.append(
            f"the policy prefers the chosen answer in only {mean['rewards/accuracies']:.0%} of "
            "pairs at the end: are chosen and rejected swapped?"
        )
    return found
