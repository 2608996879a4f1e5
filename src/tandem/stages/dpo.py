"""Stage 2: preference training, by Direct Preference Optimization or another loss."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tandem.data.batching.views import with_length_weights, with_other_answers
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
from tandem.train.objectives.labelled import LabelledObjective
from tandem.train.objectives.mixture import Mixture, check_losses
from tandem.train.objectives.objective import Objective
from tandem.train.objectives.preference import PreferenceObjective
from tandem.train.reference_logps import ReferenceStore, reference_logps
from tandem.wording import chosen_collapse

# Change this whenever the same weights and tokens would give other log-probs.
_NUMERICS = "sums in float64, products of oneDNN, vocabulary in blocks"
# Relative differences of an answer's log-prob that the dtype explains.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def run_dpo(job: TrainingJob, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Align the job's model, usually the merged SFT model, with preferences.

    The reference is the model itself as it was before the first step: with the adapter off, or with
    the adapter that training goes on with (`lora.from`) as it is in its folder. Its log-probs are
    computed before the first step or found in the store. A loss without a reference needs neither.
    See `train_stage` for the rest.
    """
    settings = job.settings
    assert isinstance(settings, DpoSettings)
    check_losses(settings)
    stage = TrainingStage(
        "dpo",
        settings.trains_on,
        lambda inputs: _objective(inputs, settings),
        dropout=False,
        reference=settings.needs_reference,
        warnings=lambda metrics: _warnings(metrics, settings.beta),
    )
    return train_stage(stage, job, console, callbacks)


def _objective(inputs: ObjectiveInputs, settings: DpoSettings) -> BuiltObjective:
    mixture, dataset = Mixture.of(settings), inputs.dataset
    reference = _Reference(inputs, settings.needs_reference)
    tolerance = _TOLERANCE[inputs.engine.device.dtype_name]
    first = np.concatenate([[0], np.cumsum(dataset.branches, dtype=np.int64)])
    answers = partial(Answers, first, divergence=mixture.divergence)
    examples: Sequence[Example] = dataset
    observed: Sequence[Example] | None = None
    objective: Objective
    if mixture.compared == "answers":
        own = answers(dataset.sequence_targets, dataset.scores, reference.logps(dataset, "answers"))
        other = own
        if mixture.couples:
            observed = with_other_answers(dataset, settings.max_length)
            logps = reference.logps(observed, "answers to other prompts")
            other = answers(dataset.sequence_targets, dataset.scores, logps)
        objective = LabelledObjective(mixture, own, other, tolerance)
    else:
        if settings.ld_alpha is not None:
            examples = with_length_weights(dataset, settings.ld_alpha)
        what = "pairs" if (dataset.branches == 2).all() else "rows"
        scores = scores_of_pairs(dataset.scores, first)
        own = answers(dataset.sequence_targets, scores, reference.logps(examples, what))
        objective = PreferenceObjective(mixture, own, tolerance)
    return BuiltObjective(objective, examples, observed, reference.seconds, reference.computed)


def scores_of_pairs(scores: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """The scores of answers [S], 1 and 0 for those of pairs without any."""
    is_first = np.zeros(len(scores))
    is_first[first[:-1]] = 1.0
    return np.where(np.isnan(scores), is_first, scores)


@dataclass
class _Reference:
    """Computes reference log-probs, and counts what that cost."""

    inputs: ObjectiveInputs
    needed: bool
    seconds: float = 0.0
    computed: int = 0

    def logps(self, examples: Sequence[Example], what: str) -> NDArray[np.float64] | None:
        """Log-probs of all sequences [S]; None where the loss needs none."""
        if not self.needed:
            return None
        began = time.perf_counter()
        logps, computed = _reference(self.inputs, examples)
        seconds, count = time.perf_counter() - began, len(examples)
        log(
            self.inputs.console,
            f"dpo: reference log-probs of {count} {self.inputs.what}{what}, {computed} computed "
            f"and {count - computed} found in the store, {seconds:.1f} s",
        )
        self.seconds += seconds
        self.computed += computed
        return logps


def _reference(
    inputs: ObjectiveInputs, examples: Sequence[Example]
) -> tuple[NDArray[np.float64], int]:
    """Log-probs of all answers under the policy as it was [S]; how many are new."""
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
    # A step without bad answers, or without good ones, says nothing of them.
    shared = {key for key in last[0] if all(key in line for line in last)}
    mean = {key: sum(line[key] for line in last) / len(last) for key in shared}
    collapse = chosen_collapse(metrics, beta)
    warnings = [] if collapse is None else [collapse]
    accuracy = mean.get("rewards/accuracies", 1.0)  # a loss may have no rewards
    if accuracy < 0.5 and mean.get("rewards/margins", 0.0) < -1e-4:
        warnings.append(
            f"the policy prefers the chosen answer in only {accuracy:.0%} of pairs at the end: are "
            "chosen and rejected swapped?"
        )
    return warnings
