"""Stage 2: Direct Preference Optimization of a LoRA adapter on preference pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tandem.errors import UserError
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.training_settings import DpoSettings
from tandem.runtime.console import log, phase
from tandem.stages.training.context import BuiltObjective, ObjectiveInputs, TrainingStage
from tandem.stages.training.train_stage import train_stage
from tandem.storage.hashing import hash_json
from tandem.train.callbacks.callback import Callback
from tandem.train.losses.objectives import PreferenceObjective, find_loss
from tandem.train.losses.registry import PreferenceLoss
from tandem.train.reference_logps import ReferenceStore, reference_logps
from tandem.wording import chosen_collapse

# Change this whenever the same weights and tokens would give other log-probs.
_NUMERICS = "sums in float64, products of oneDNN, vocabulary in blocks"
# Relative differences of an answer's log-prob that the dtype explains.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def run_dpo(job: TrainingJob, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Align the job's model, usually the merged SFT model, with preference pairs.

    The reference is the model itself as it was before the first step: with the adapter off, or with
    the adapter that training goes on with (`lora.from`) as it is in its folder. Its log-probs are
    computed before the first step or found in the store. See `train_stage` for the rest.
    """
    settings = job.settings
    assert isinstance(settings, DpoSettings)
    loss = find_loss(settings.loss)
    if not loss.paired:
        raise UserError(f"dpo trains on pairs, which the loss {loss.name} does not compare")
    stage = TrainingStage(
        "dpo",
        "preference pairs",
        lambda inputs: _objective(inputs, loss, settings),
        dropout=False,
        reference=loss.reference,
        warnings=lambda metrics: _warnings(metrics, settings.beta),
    )
    return train_stage(stage, job, console, callbacks)


def _objective(
    inputs: ObjectiveInputs, loss: PreferenceLoss, settings: DpoSettings
) -> BuiltObjective:
    tokens = inputs.dataset.sequence_targets.reshape(-1, 2)
    tolerance = _TOLERANCE[inputs.engine.device.dtype_name]
    build = partial(PreferenceObjective, loss, settings, tokens, relative_tolerance=tolerance)
    if not loss.reference:
        return BuiltObjective(build(reference=None))
    began = time.perf_counter()
    reference, computed = _reference(inputs)
    seconds, count = time.perf_counter() - began, len(inputs.dataset)
    log(
        inputs.console,
        f"dpo: reference log-probs of {count} {inputs.what}pairs, {computed} computed and "
        f"{count - computed} found in the store, {seconds:.1f} s",
    )
    return BuiltObjective(build(reference=reference), seconds, computed)


def _reference(inputs: ObjectiveInputs) -> tuple[NDArray[np.float64], int]:
    """Log-probs of all answers under the policy as it was [n, 2]; how many are new."""
    device = inputs.engine.device
    identity = hash_json(
        {
            "numerics": _NUMERICS,
            "model": inputs.model_hash,
            "dtype": device.dtype_name,
            "attention": inputs.backend,
            "device": device.kind,
            "kernels": inputs.numerics,
        }
    )
    store = ReferenceStore(lambda text: log(inputs.console, f"dpo: {text}"))
    without = inputs.weights.reference(inputs.model)
    if without is None:
        raise UserError(
            "dpo: the model that is trained cannot be its own reference with these weights, and a "
            "second model is not supported"
        )
    with without, phase(inputs.console, "reference log-probs", len(inputs.dataset)) as advance:
        logps = reference_logps(
            inputs.engine, inputs.dataset,
            store=store, identity=identity, budget=inputs.budget, advance=advance,
        )  # fmt: skip
    inputs.engine.processes.on_rank0(store.prune)
    return logps


def _warnings(metrics: list[dict[str, Any]], beta: float) -> list[str]:
    if not metrics:
        return []
    last = metrics[-max(1, math.ceil(len(metrics) / 4)) :]
    mean = {key: sum(line[key] for line in last) / len(last) for key in metrics[0]}
    collapse = chosen_collapse(metrics, beta)
    warnings = [] if collapse is None else [collapse]
    accuracy = mean.get("rewards/accuracies", 1.0)  # a loss may have no rewards
    if accuracy < 0.5 and mean.get("rewards/margins", 0.0) < 0:
        warnings.append(
            f"the policy prefers the chosen answer in only {accuracy:.0%} of pairs at the end: are "
            "chosen and rejected swapped?"
        )
    return warnings
