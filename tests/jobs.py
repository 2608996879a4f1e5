"""Jobs as tests ask for them: on a CPU, without a chat template, in any number format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.jobs import EvaluationJob, MergeJob, PairsJob, TrainingJob
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import MergeSettings, TrainingSettings


def run_settings(model: str | Path, folder: Path, **run: Any) -> RunSettings:
    """Settings of a run; float64, which no recipe has, is not validated."""
    unchecked = {key: run.pop(key) for key in ("dtype",) if key in run}
    made = RunSettings(model=str(model), output_dir=str(folder), **{"device": "cpu", **run})
    return made.model_copy(update=unchecked)


def training_job(
    settings: TrainingSettings, model: str | Path, folder: Path, *, seed: int = 1, **run: Any
) -> TrainingJob:
    return TrainingJob(run_settings(model, folder, seed=seed, **run), settings)


def merge_job(
    base: str | Path,
    adapter: Path,
    folder: Path,
    *,
    dtype: Any = "auto",
    force: bool = False,
    **run: Any,
) -> MergeJob:
    settings = MergeSettings(dtype=dtype)
    return MergeJob(run_settings(base, folder, **run), settings, adapter, force)


def pairs_job(
    settings: PairsSettings,
    model: str | Path,
    folder: Path,
    *,
    seed: int = 1,
    in_round: int = 1,
    **run: Any,
) -> PairsJob:
    return PairsJob(run_settings(model, folder, seed=seed, **run), settings, in_round)


def evaluation_job(
    settings: EvaluationSettings,
    models: dict[str, str],
    folder: Path,
    *,
    replace: bool = False,
    **run: Any,
) -> EvaluationJob:
    return EvaluationJob(run_settings("", folder, **run), settings, models, replace)
