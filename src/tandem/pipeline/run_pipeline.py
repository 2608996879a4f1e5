"""The whole ride: SFT, merge, pairs, DPO, merge, evaluation, report; resumable by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.errors import UserError
from tandem.pairs.pairs_file import made_pairs
from tandem.pipeline.preflight import check_inputs
from tandem.recipe.data_source import DataSource
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import DpoSettings
from tandem.storage.atomic_files import atomic_write_json, atomic_write_text, remove_left_behind
from tandem.storage.hashing import hash_json, read_object, sealed, text_hash
from tandem.storage.manifest import NAME as MANIFEST
from tandem.storage.manifest import check_outputs, read_manifest, versions

if TYPE_CHECKING:
    from tandem.runtime.process_group import ProcessGroup

STAGES = ("sft", "sft-merge", "pairs", "dpo", "dpo-merge", "evaluate")
# Those that all processes of a run take part in.
_TRAINING = ("sft", "dpo")
# What a run writes beside its stages' folders.
_ROOT_FILES = (MANIFEST, "recipe.yaml", "report.html")
_FOLDERS = {
    "sft": "1-sft",
    "sft-merge": "2-sft-merged",
    "pairs": "3-pairs",
    "dpo": "4-dpo",
    "dpo-merge": "5-final",
    "evaluate": "6-evaluation",
}


@dataclass(frozen=True)
class PlannedStage:
    """A stage of this recipe, its folder, and a line on what it does."""

    name: str
    folder: Path
    note: str


def folder_of(recipe: Recipe, stage: str) -> Path:
    """The folder of one of a recipe's stages, whether it has run or not."""
    return Path(recipe.output_dir) / _FOLDERS[stage]


def describe_pipeline(recipe: Recipe) -> list[PlannedStage]:
    """The stages that a recipe asks for, in order; needs neither data nor weights."""
    notes: dict[str, str] = {}
    if recipe.sft is not None:
        data = ", ".join(source.path for source in recipe.sft.data)
        notes["sft"] = f"fine-tune {recipe.model} on {data}"
        notes["sft-merge"] = "merge the adapter, verified"
    if recipe.pairs is not None:
        prompts = ", ".join(source.path for source in recipe.pairs.prompts)
        server = recipe.pairs.server
        writer = server.model if server else recipe.pairs.model or "the model so far"
        notes["pairs"] = f"prompts of {prompts}, rejected answers by {writer}"
    if recipe.dpo is not None:
        data = ", ".join(source.path for source in recipe.dpo.data) or "the pairs made before"
        notes["dpo"] = f"align with {data}"
        notes["dpo-merge"] = "merge the adapter, verified: the final model"
    if recipe.evaluate is not None:
        notes["evaluate"] = "base, SFT and final model on held-out questions and pairs"
        named = [n for n in (recipe.evaluate.suite, *recipe.evaluate.tasks) if n]
        if named:
            notes["evaluate"] += f", and on {', '.join(named)}"
    return [
        PlannedStage(name, folder_of(recipe, name), notes[name]) for name in STAGES if name in notes
    ]


def run_pipeline(
    recipe: Recipe, *, until: str | None, start: str | None, console: Console
) -> dict[str, Any] | None:
    """Run a recipe's stages; finished ones are recognised, an interrupted one goes on.

    Args:
        recipe: the resolved recipe.
        until: the last stage to run.
        start: the first stage to run; the ones before it must be finished.
        console: where progress is drawn.

    Returns:
        What the evaluation found, if the recipe has one and it was reached.

    Where a launcher started several processes, all of them call it. They train together; rank 0
    alone does the rest, and is alone in having a result.

    Raises UserError for stages that the recipe lacks, and what the stages raise.
    """
    processes = _joined(recipe)
    if not processes.is_rank0:
        console = Console(quiet=True)
    planned = describe_pipeline(recipe)
    root = Path(recipe.output_dir)
    ride = _Ride(recipe, root, console)
    runners: dict[str, Callable[[Path], Any]] = {
        "sft": ride.sft,
        "sft-merge": ride.sft_merge,
        "pairs": ride.pairs,
        "dpo": ride.dpo,
        "dpo-merge": ride.dpo_merge,
        "evaluate": ride.evaluate,
    }
    result = None
    with processes.shared_fate():
        asked = {"recipe": recipe.model_dump(mode="json"), "until": until, "from": start}
        processes.require_same(recipe=hash_json(asked))
        wanted = processes.on_rank0(lambda: _select(planned, until=until, start=start))
        processes.on_rank0(lambda: _check_root(root))
        processes.rank0_alone(lambda: check_inputs(recipe, wanted))
        for number, stage in enumerate(planned, start=1):
            if stage.name not in wanted:
                continue
            console.rule(f"{number}/{len(planned)} {stage.name}: {stage.note}", align="left")
            finished_before = processes.on_rank0(partial(_is_finished, stage))
            run = partial(runners[stage.name], stage.folder)
            # All train; what else there is to do, one does while the others wait.
            result = run() if stage.name in _TRAINING else processes.rank0_alone(run)
            processes.on_rank0(partial(_record, recipe, planned, new=not finished_before))
    return result if isinstance(result, dict) else None


def _joined(recipe: Recipe) -> ProcessGroup:
    """The processes that a launcher started, in contact with each other."""
    from tandem.integrations.choose import choose_device
    from tandem.runtime.launch import launched
    from tandem.runtime.process_group import ProcessGroup, join

    launch = launched()
    if launch.count == 1:
        return ProcessGroup(launch)
    backend = choose_device(recipe.device, recipe.dtype).backend
    return join(launch, backend, timedelta(minutes=recipe.timeout_minutes))


def _record(recipe: Recipe, planned: list[PlannedStage], *, new: bool) -> None:
    """What the run's folder says about itself after a stage."""
    from tandem.recipe.load_recipe import recipe_to_yaml

    root = Path(recipe.output_dir)
    # Only a stage that really ran makes this recipe the folder's own.
    text = recipe_to_yaml(recipe) if new else None
    # The chain first: it marks the folder as a run's, whose recipe may be replaced.
    _write_chain(planned, root, text)
    if text is not None:
        atomic_write_text(root / "recipe.yaml", text)


def asked_for(planned: Sequence[PlannedStage], *, until: str | None, start: str | None) -> range:
    """Which of the stages are asked for, by their places.

    Raises UserError for a stage that the recipe lacks, and for an end before the start.
    """
    names = [stage.name for stage in planned]
    for flag, name in (("--until", until), ("--from", start)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: this recipe's stages are {', '.join(names)}")
    first = names.index(start) if start else 0
    last = names.index(until) if until else len(names) - 1
    if first > last:
        raise UserError(f"--from {start} comes after --until {until}")
    return range(first, last + 1)


def _select(planned: list[PlannedStage], *, until: str | None, start: str | None) -> set[str]:
    asked = asked_for(planned, until=until, start=start)
    for stage in planned[: asked.start]:
        manifest = read_manifest(stage.folder)
        if manifest is None or manifest["status"] != "finished":
            raise UserError(f"--from {start}: the stage before it, {stage.folder}, is not finished")
        check_outputs(stage.folder, manifest["outputs"])
    return {planned[place].name for place in asked}


def _is_finished(stage: PlannedStage) -> bool:
    manifest = read_manifest(stage.folder)
    return manifest is not None and manifest["status"] == "finished"


def _check_root(root: Path) -> None:
    """Raise UserError for a folder with files that a run would write over and did not write."""
    foreign = [name for name in _ROOT_FILES if (root / name).exists()]
    if not foreign:
        return
    with suppress(UserError):
        read_object(root / MANIFEST, {"stages": dict}, "")
        return
    # The run's own manifest is written anew after each stage.
    for folder in _FOLDERS.values():
        with suppress(UserError):
            if read_manifest(root / folder) is not None:
                return
    raise UserError(
        f"output_dir: {root} is no run's folder and has a {foreign[0]}, which the run would write "
        "over. Choose another output_dir."
    )


@dataclass(frozen=True)
class _Ride:
    """One recipe on its way; stage modules are imported when their stage runs."""

    recipe: Recipe
    root: Path
    console: Console

    def sft(self, folder: Path) -> None:
        """Fine-tune the base."""
        from tandem.stages.sft import run_sft

        assert self.recipe.sft is not None
        run_sft(
            model=self.recipe.model,
            revision=self.recipe.model_revision,
            settings=self.recipe.sft,
            output_dir=folder,
            chat_template=self.recipe.chat_template,
            added_tokens=self.recipe.added_tokens,
            seed=self.recipe.seed,
            runtime=self._runtime(),
            console=self.console,
        )

    def sft_merge(self, folder: Path) -> None:
        """Merge the first adapter."""
        self._merge(self._base(), self.root / _FOLDERS["sft"], folder)

    def pairs(self, folder: Path) -> None:
        """Make preference pairs."""
        from tandem.pairs.make_pairs import run_pairs

        assert self.recipe.pairs is not None
        run_pairs(
            model=self.recipe.pairs.model or self._dpo_base(),
            settings=self.recipe.pairs,
            output_dir=folder,
            seed=self.recipe.seed,
            runtime=self._runtime(),
            console=self.console,
        )

    def dpo(self, folder: Path) -> None:
        """Align the merged model, or the base."""
        from tandem.stages.dpo import run_dpo

        base = self._dpo_base()
        run_dpo(
            model=base,
            revision=None if self.recipe.sft else self.recipe.model_revision,
            settings=self._dpo_settings(),
            output_dir=folder,
            # A merged model brings the template it was tuned with.
            chat_template=None if self.recipe.sft else self.recipe.chat_template,
            added_tokens=() if self.recipe.sft else self.recipe.added_tokens,
            seed=self.recipe.seed,
            runtime=self._runtime(),
            console=self.console,
        )

    def dpo_merge(self, folder: Path) -> None:
        """Merge the second adapter: the final model, with its card."""
        from tandem.report.model_card import write_card

        self._merge(self._dpo_base(), self.root / _FOLDERS["dpo"], folder)
        write_card(self.root, folder)

    def evaluate(self, folder: Path) -> dict[str, Any]:
        """Ask all models of the run the same; returns what was found."""
        from tandem.evaluate.evaluate_models import run_evaluation
        from tandem.report.model_card import write_card

        settings = self.recipe.evaluate
        assert settings is not None
        heldout = made_pairs(self.root / _FOLDERS["pairs"], "heldout")
        if not settings.pairs and heldout is not None:
            settings = settings.model_copy(update={"pairs": (DataSource(path=str(heldout)),)})
        evaluation = run_evaluation(
            models=self._models(),
            settings=settings,
            output_dir=folder,
            chat_template=self.recipe.chat_template,
            added_tokens=self.recipe.added_tokens,
            seed=self.recipe.seed,
            runtime=self._runtime(),
            console=self.console,
        )
        final = self.root / _FOLDERS["dpo-merge"]
        if final.exists():
            write_card(self.root, final)
        return evaluation

    def _models(self) -> dict[str, str]:
        models = {"base": self._base()}
        if self.recipe.sft is not None:
            models["sft"] = str(self.root / _FOLDERS["sft-merge"])
        if self.recipe.dpo is not None:
            models["dpo"] = str(self.root / _FOLDERS["dpo-merge"])
        return models

    def _base(self) -> str:
        """The model that the run began with."""
        from tandem.model.model_folder import model_folder

        if self.recipe.model_revision is None:
            return self.recipe.model
        return str(model_folder(self.recipe.model, self.recipe.model_revision))

    def _merge(self, base: str, adapter: Path, folder: Path) -> None:
        from tandem.stages.merge import run_merge

        run_merge(
            base=base,
            adapter=adapter,
            output_dir=folder,
            dtype=self.recipe.merge.dtype,
            force=False,
            device=self.recipe.device,
            console=self.console,
        )

    def _dpo_base(self) -> str:
        return str(self.root / _FOLDERS["sft-merge"]) if self.recipe.sft else self.recipe.model

    def _dpo_settings(self) -> DpoSettings:
        settings = self.recipe.dpo
        assert settings is not None
        if settings.data:
            return settings
        made = made_pairs(self.root / _FOLDERS["pairs"])
        assert made is not None, "the pairs stage comes before"
        return settings.model_copy(update={"data": (DataSource(path=str(made)),)})

    def _runtime(self) -> Any:
        from tandem.recipe.run_settings import runtime_of

        return runtime_of(self.recipe)


def _write_chain(planned: list[PlannedStage], root: Path, recipe: str | None) -> None:
    """The run's manifest: each stage's inputs and outputs by hash, data to evaluation.

    `recipe` is the text that recipe.yaml gets, None where that stays as it is.
    """
    chain = {}
    for stage in planned:
        manifest = read_manifest(stage.folder)
        if manifest is not None:
            kept = ("stage", "status", "inputs_hash", "outputs", "started_at", "finished_at")
            chain[stage.folder.name] = {key: manifest.get(key) for key in kept}
    remove_left_behind(root)
    about: dict[str, Any] = {"stages": chain, "versions": versions()}
    if recipe is not None:
        about["recipe"] = text_hash(recipe)
    else:
        with suppress(UserError):
            about["recipe"] = read_object(root / MANIFEST, {"recipe": str}, "")["recipe"]
    atomic_write_json(root / MANIFEST, sealed(about))
