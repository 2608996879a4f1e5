"""The whole run: SFT, merge, pairs, DPO, merge, evaluation, report; resumable by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.errors import UserError
from tandem.integrations.choose import choose_device
from tandem.pipeline import stage_jobs as jobs
from tandem.pipeline.preflight import check_inputs
from tandem.recipe.choices import TRAINING_STAGES, TrainingStageName
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.recipe import PipelineStage, Recipe, asked_for, result_of, stages_of
from tandem.runtime.launch import launched
from tandem.runtime.process_group import ProcessGroup, join
from tandem.stages.finished import merge_is_finished, training_is_finished
from tandem.storage.atomic_files import atomic_write_json, atomic_write_text, remove_left_behind
from tandem.storage.folder_lock import check_free
from tandem.storage.hashing import hash_json, read_object, sealed, text_hash
from tandem.storage.manifest import NAME as MANIFEST
from tandem.storage.manifest import check_outputs, is_finished, read_manifest, versions
from tandem.storage.run_folder import model_in_run, stages_in

if TYPE_CHECKING:
    from tandem.train.callbacks.callback import Callback

# What a run writes beside its stages' folders.
_ROOT_FILES = (MANIFEST, "recipe.yaml", "report.html")


def run_pipeline(
    recipe: Recipe,
    *,
    until: str | None,
    start: str | None,
    console: Console,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """Run a recipe's stages from `start` to `until`; finished ones are recognised, others resumed.

    The stages before `start` must be finished. All processes of a launcher call it: they train
    together, and rank 0 alone does the rest. The callbacks are called in the training stages, after
    the default ones.

    Returns what the evaluation found, in rank 0. Raises UserError for stages that the recipe lacks,
    and what the stages raise.
    """
    processes = joined(recipe)
    if not processes.is_rank0:
        console = Console(quiet=True)
    planned = stages_of(recipe)
    root = Path(recipe.output_dir)
    result = None
    with processes.shared_fate():
        asked = {"recipe": recipe.model_dump(mode="json"), "until": until, "from": start}
        processes.require_same(recipe=hash_json(asked))
        wanted = processes.on_rank0(lambda: _select(planned, until=until, start=start))
        processes.on_rank0(lambda: _check_root(root))
        processes.rank0_alone(lambda: _check_inputs(recipe, planned, wanted))
        for number, stage in enumerate(planned, start=1):
            if stage.name not in wanted:
                continue
            console.rule(f"{number}/{len(planned)} {stage.name}: {stage.note}", align="left")
            finished_before = processes.on_rank0(partial(is_finished, stage.folder))
            run = partial(_run_stage, recipe, stage, console, callbacks)
            # All processes train; rank 0 does the rest while the others wait.
            result = run() if stage.stage.work in TRAINING_STAGES else processes.rank0_alone(run)
            processes.on_rank0(partial(_record, recipe, planned, stage, new=not finished_before))
    return result if isinstance(result, dict) else None


def joined(recipe: Recipe) -> ProcessGroup:
    """Connect the processes that a launcher started."""
    launch = launched()
    if launch.count == 1:
        return ProcessGroup(launch)
    backend = choose_device(recipe.device, recipe.dtype).backend
    return join(launch, backend, timedelta(minutes=recipe.timeout_minutes))


def _record(
    recipe: Recipe, planned: list[PipelineStage], stage: PipelineStage, *, new: bool
) -> None:
    """Write the run's manifest and recipe after a stage, and the last model's card."""
    from tandem.recipe.load_recipe import recipe_to_yaml

    root = Path(recipe.output_dir)
    # Only a stage that really ran makes this recipe the folder's own.
    text = recipe_to_yaml(recipe) if new else None
    # First the manifest: it marks the folder as a run's, whose recipe may be replaced.
    _write_chain(planned, root, text)
    if text is not None:
        atomic_write_text(root / "recipe.yaml", text)
    newest = Path(model_in_run(str(root)))
    # An aligned model, right after it was made and when it is evaluated.
    results = {one.folder for one in planned if one.stage.work == result_of(recipe, "dpo")}
    if newest in results and (stage.folder == newest or stage.name == "evaluate"):
        from tandem.report.model_card import write_card

        write_card(root, newest)


def _select(planned: list[PipelineStage], *, until: str | None, start: str | None) -> set[str]:
    asked = asked_for(planned, until=until, start=start)
    for stage in planned[: asked.start]:
        manifest = read_manifest(stage.folder)
        if manifest is None or manifest["status"] != "finished":
            raise UserError(f"--from {start}: the stage before it, {stage.folder}, is not finished")
        check_outputs(stage.folder, manifest["outputs"])
    return {planned[place].name for place in asked}


def _check_inputs(recipe: Recipe, planned: list[PipelineStage], wanted: set[str]) -> None:
    """See `check_inputs`; raises UserError, too, if another process holds the first stage to do."""
    to_do = [stage for stage in planned if stage.name in wanted and not is_finished(stage.folder)]
    if to_do:
        check_free(to_do[0].folder)
    check_inputs(recipe, wanted, wanted - {stage.name for stage in to_do})


def _check_root(root: Path) -> None:
    """Raise UserError if the run would overwrite files that no run has written."""
    foreign = [name for name in _ROOT_FILES if (root / name).exists()]
    if not foreign:
        return
    with suppress(UserError):
        read_object(root / MANIFEST, {"stages": dict}, "")
        return
    # The run's own manifest is written anew after each stage.
    for stage in stages_in(root):
        with suppress(UserError):
            if read_manifest(root / stage.folder) is not None:
                return
    raise UserError(
        f"output_dir: {root} is not the folder of a run, and the run would overwrite its "
        f"{foreign[0]}. Choose another output_dir."
    )


def _run_stage(
    recipe: Recipe, stage: PipelineStage, console: Console, callbacks: Sequence[Callback]
) -> Any:
    """Run one stage of a recipe, importing its modules; returns what an evaluation measured."""
    work, in_round = stage.stage.work, stage.stage.round
    if work == "sft":
        return run_training("sft", jobs.sft_job(recipe), console, callbacks)
    if work == "dpo":
        return run_training("dpo", jobs.dpo_job(recipe, in_round), console, callbacks)
    if work == "pairs":
        from tandem.pairs.make_pairs import make_pairs

        return make_pairs(jobs.pairs_job(recipe, in_round), console)
    if work == "evaluate":
        from tandem.evaluate.evaluate_models import evaluate_models

        return evaluate_models(jobs.evaluation_job(recipe), console)
    merge = jobs.merge_job(recipe, work, in_round)
    if not merge_is_finished(merge, console):
        from tandem.stages.merge import run_merge

        run_merge(merge, console)
    return None


def run_training(
    stage: TrainingStageName,
    job: TrainingJob,
    console: Console,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run SFT or DPO unless it is finished; torch is imported only if there is something to do.

    The callbacks are called after the default ones.
    """
    if training_is_finished(stage, job, console):
        return job.folder
    from tandem.pipeline.default_callbacks import default_callbacks

    if stage == "sft":
        from tandem.stages.sft import run_sft

        return run_sft(job, console, [*default_callbacks(job.run), *callbacks])
    from tandem.stages.dpo import run_dpo

    return run_dpo(job, console, [*default_callbacks(job.run), *callbacks])


def _write_chain(planned: list[PipelineStage], root: Path, recipe: str | None) -> None:
    """The run's manifest: each stage's inputs and outputs by hash, data to evaluation.

    `recipe` is the text that recipe.yaml gets, None where that stays as it is.
    """
    chain = {}
    for stage in planned:
        manifest = read_manifest(stage.folder)
        if manifest is not None:
            kept = ("stage", "status", "inputs_hash", "outputs", "started_at", "finished_at")
            chain[stage.stage.folder] = {key: manifest.get(key) for key in kept}
    remove_left_behind(root)
    about: dict[str, Any] = {"stages": chain, "versions": versions()}
    if recipe is not None:
        about["recipe"] = text_hash(recipe)
    else:
        with suppress(UserError):
            about["recipe"] = read_object(root / MANIFEST, {"recipe": str}, "")["recipe"]
    atomic_write_json(root / MANIFEST, sealed(about))
