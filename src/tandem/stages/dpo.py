"""Stage 2: Direct Preference Optimization of a LoRA adapter on preference pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tandem.data.batching.views import with_length_weights
from tandem.data.encoded.example import Example
from tandem.errors import UserError
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.jobs import TrainingJob
from tandem.runtime.console import log, phase
from tandem.stages.training.context import BuiltObjective, ObjectiveInputs, TrainingStage
from tandem.stages.training.train_stage import train_stage
from tandem.storage.hashing import hash_json
from tandem.train.callbacks.callback import Callback
from tandem.train.objectives.answers import Answers
from tandem.train.objectives.mixture import Mixture
from tandem.train.objectives.preference import PreferenceObjective
from tandem.train.reference_logps import ReferenceStore, reference_logps
from tandem.wording import chosen_collapse

# Change this whenever the same weights and tokens would give other log-probs.
_NUMERICS = "sums in float64, products of oneDNN, vocabulary in blocks"
# Relative differences of an answer's log-prob that the dtype explains.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def run_dpo(job: TrainingJob, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Align the job's model, usually the merged SFT model, with preferences.

    The reference is the model itself with the adapter off; its log-probs are computed before the
    first step or found in the store. A loss without a reference needs neither. See `train_stage`
    for the rest.
    """
    settings = job.settings
    assert isinstance(settings, DpoSettings)
    stage = TrainingStage(
        "dpo",
        "preference pairs",
        lambda inputs: _objective(inputs, settings),
        dropout=False,
        warnings=lambda metrics: _warnings(metrics, settings.beta),
    )
    return train_stage(stage, job, console, callbacks)


def _objective(inputs: ObjectiveInputs, settings: DpoSettings) -> BuiltObjective:
    mixture, dataset = Mixture.of(settings), inputs.dataset
    examples: Sequence[Example] = dataset
    if settings.ld_alpha is not None:
        examples = with_length_weights(dataset, settings.ld_alpha)
    began = time.perf_counter()
    reference, computed = _reference(inputs, examples) if mixture.reference else (None, 0)
    seconds, count = time.perf_counter() - began, len(dataset)
    if reference is not None:
        log(
            inputs.console,
            f"dpo: reference log-probs of {count} {inputs.what}pairs, {computed} computed and "
            f"{count - computed} found in the store, {seconds:.1f} s",
        )
    first = np.concatenate([[0], np.cumsum(dataset.branches, dtype=np.int64)])
    scores = np.where(np.arange(first[-1]) % 2 == 0, 1.0, 0.0)
    answers = Answers(first, dataset.sequence_targets, scores, reference, mixture.divergence)
    tolerance = _TOLERANCE[inputs.engine.device.dtype_name]
    return BuiltObjective(
        PreferenceObjective(mixture, answers, tolerance),
        examples,
        reference_seconds=seconds if mixture.reference else 0.0,
        reference_computed=computed,
    )


def _reference(
    inputs: ObjectiveInputs, examples: Sequence[Example]
) -> tuple[NDArray[np.float64], int]:
    """Log-probs of all answers under the policy without its adapter [S]; how many are new."""
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
    with without, phase(inputs.console, "reference log-probs", len(examples)) as advance:
        logps = reference_logps(
            inputs.engine, examples,
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
