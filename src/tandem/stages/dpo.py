"""Stage 2: Direct Preference Optimization of a LoRA adapter on preference pairs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.errors import UserError
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.training_settings import DpoSettings
from tandem.runtime.console import log, phase
from tandem.stages.training.context import BuiltObjective, ObjectiveInputs, TrainingStage
from tandem.stages.training.train_stage import train_stage
from tandem.storage.hashing import hash_json
from tandem.train.losses.objectives import PreferenceObjective
from tandem.train.reference_logps import ReferenceStore, reference_logps
from tandem.wording import chosen_collapse

# Change this whenever the same weights and tokens would give other log-probs.
_NUMERICS = "sums in float64, products of oneDNN, vocabulary in blocks"
# Relative differences of an answer's log-prob that the dtype explains.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def run_dpo(job: TrainingJob, console: Console) -> Path:
    """Align the job's model, usually the merged SFT model, with preference pairs.

    The reference is the model itself with the adapter off; its log-probs are computed before the
    first step or found in the store. See `train_stage` for the rest.
    """
    assert isinstance(job.settings, DpoSettings)
    beta = job.settings.beta
    stage = TrainingStage(
        "dpo",
        "preference pairs",
        lambda inputs: _objective(inputs, beta),
        dropout=False,
        warnings=lambda metrics: _warnings(metrics, beta),
    )
    return train_stage(stage, job, console)


def _objective(inputs: ObjectiveInputs, beta: float) -> BuiltObjective:
    began = time.perf_counter()
    device = inputs.engine.device
    dtype = device.dtype_name
    identity = hash_json(
        {
            "numerics": _NUMERICS,
            "model": inputs.model_hash,
            "dtype": dtype,
            "attention": inputs.backend,
            "device": device.kind,
            "kernels": inputs.numerics,
        }
    )
    processes = inputs.engine.processes
    store = ReferenceStore(lambda text: log(inputs.console, f"dpo: {text}"))
    without = inputs.weights.reference(inputs.model)
    if without is None:
        raise UserError(
            "dpo: the model that is trained cannot be its own reference with these weights, and a "
            "second model is not supported"
        )
    with (
        without,
        phase(inputs.console, "reference log-probs", len(inputs.dataset)) as advance,
    ):
        reference, computed = reference_logps(
            inputs.engine,
            inputs.dataset,
            store=store,
            identity=identity,
            budget=inputs.budget,
            advance=advance,
        )
    processes.on_rank0(store.prune)
    seconds = time.perf_counter() - began
    log(
        inputs.console,
        f"dpo: reference log-probs of {len(inputs.dataset)} {inputs.what}pairs, {computed} "
        f"computed and {len(inputs.dataset) - computed} found in the store, {seconds:.1f} s",
    )
    objective = PreferenceObjective(reference, beta=beta, relative_tolerance=_TOLERANCE[dtype])
    return BuiltObjective(objective, seconds, computed)


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
