"""`tandem.run` and `tandem.plan`: whole recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tandem.api.evaluation import Evaluation
from tandem.api.generation import forget_model
from tandem.api.pages import Page, preformatted, printed, table
from tandem.api.result import OnStep, Result
from tandem.api.session import open_console, prepare, require_alone
from tandem.api.training import until_its_stage
from tandem.errors import UserError
from tandem.recipe.explain_errors import submodel
from tandem.recipe.load_recipe import changed_recipe, load_recipe, recipe_to_yaml
from tandem.recipe.recipe import Recipe, stages_of
from tandem.runtime.launch import launched
from tandem.storage.atomic_files import read_json
from tandem.storage.manifest import is_finished
from tandem.storage.run_folder import StageName, made_pairs, output_folder, stage_folder

if TYPE_CHECKING:
    from tandem.plan.plan_recipe import Plan as Planned

AnyRecipe = str | PathLike[str] | Recipe
"""A shipped recipe's name, a YAML file, a run's folder, or a recipe as results have it."""

_WITH_MODELS: tuple[StageName, ...] = ("sft", "sft-merge", "dpo", "dpo-merge")


def run(
    recipe: AnyRecipe,
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    until: str | None = None,
    start: str | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    **overrides: Any,
) -> RunResult:
    """Run a recipe's stages, as `tandem run` does: finished ones are recognised, others resumed.

    Args:
        recipe: a shipped recipe's name, a YAML file, a run's folder, or a recipe.
        changes: keys of the recipe with new values: `{"dpo.beta": 0.05}`, or
            `{"dpo": {"beta": 0.05}}`, which changes this key of the section.
        until: the last stage to run, such as `sft`; None: all.
        start: the first stage to run; those before it must be finished.
        quiet: print no progress.
        on_step: called with each logged line of metrics; ends the run if it returns "stop".
        overrides: the same as keyword arguments: `dpo={"beta": 0.05}`, `seed=3`.

    Raises UserError for mistakes, before anything is trained, and Stopped after an interruption.
    """
    from tandem.api.step_callback import StepCallback
    from tandem.pipeline.run_pipeline import run_pipeline

    loaded = loaded_recipe(recipe, {**changes, **overrides})
    output_folder(Path(loaded.output_dir), "output_dir")
    console = open_console(quiet=quiet)
    prepare(loaded, console)
    forget_model()
    callbacks = [] if on_step is None else [StepCallback(on_step)]
    run_pipeline(loaded, until=until, start=start, console=console, callbacks=callbacks)
    result = RunResult(loaded, quiet)
    if launched().rank == 0:
        result.report()
    return result


@dataclass(frozen=True)
class RunResult:
    """A run: the stages that are finished, and what its evaluation found."""

    recipe: Recipe
    quiet: bool = field(default=False, repr=False, compare=False)  # whether merging prints nothing

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output_dir)

    @property
    def stages(self) -> dict[str, Result]:
        """The finished training stages and merges, by name, in the recipe's order."""
        return {
            one.name: until_its_stage(
                Result(one.stage.work, self.recipe, self.quiet, one.stage.round)
            )
            for one in stages_of(self.recipe)
            if one.stage.work in _WITH_MODELS and is_finished(one.folder)
        }

    @property
    def final(self) -> Result:
        """The last of them, whose model is the run's; raises UserError if there is none yet."""
        stages = self.stages
        if not stages:
            raise UserError(f"{self.folder}: no training stage is finished yet")
        return [*stages.values()][-1]

    @property
    def pairs(self) -> Path | None:
        """The file of preference pairs that the run made last; None where it made none."""
        folders = [one.folder for one in stages_of(self.recipe) if one.stage.work == "pairs"]
        return next(filter(None, map(made_pairs, reversed(folders))), None)

    @property
    def evaluation(self) -> Evaluation | None:
        """What the evaluation found; None while it is not finished."""
        folder = stage_folder(self.folder, "evaluate")
        if not is_finished(folder):
            return None
        return Evaluation(read_json(folder / "evaluation.json"), folder, stages=True)

    @property
    def recipe_yaml(self) -> str:
        """The recipe as YAML, which `tandem run` takes."""
        return recipe_to_yaml(self.recipe)

    def report(self) -> Page:
        """Write the run's report.html anew and return it; a notebook shows the page."""
        from tandem.report.html import write_report

        return Page(write_report(self.folder))

    def __fspath__(self) -> str:
        """The run's folder."""
        return fspath(self.folder)

    def __repr__(self) -> str:
        lines = [f"<run {self.folder}: {', '.join(self.stages) or 'no stage finished'}>"]
        if (evaluation := self.evaluation) is not None:
            lines.append(repr(evaluation))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(name, result.folder) for name, result in self.stages.items()]
        rows.append(("report", self.folder / "report.html"))
        evaluation = self.evaluation
        return table(rows) + ("" if evaluation is None else evaluation._repr_html_())


def plan(
    recipe: AnyRecipe,
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    processes: int = 1,
    download: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Plan:
    """Say what a recipe's training would do and take, before it starts; nothing is trained.

    Args:
        recipe: a shipped recipe's name, a YAML file, a run's folder, or a recipe, such as that of
            a result.
        changes: as for `run`.
        processes: in how many it would run.
        download: whether data sets of the Hub may be fetched.
        quiet: print no progress.
        overrides: as for `run`.

    Raises UserError for a model or data that training would refuse.
    """
    from tandem.pipeline.preflight import check_paths
    from tandem.plan.plan_recipe import plan_recipe

    require_alone("plan")
    if processes < 1:
        raise UserError(f"plan(): processes is {processes}; it must be at least 1")
    loaded = loaded_recipe(recipe, {**changes, **overrides})
    console = open_console(quiet=quiet)
    prepare(loaded, console)
    check_paths(loaded.model_copy(update={"pairs": None, "evaluate": None}), weights=False)
    return Plan(plan_recipe(loaded, processes=processes, download=download, console=console))


@dataclass(frozen=True)
class Plan:
    """What a recipe would do and take; `figures` are those of `tandem plan --json`."""

    planned: Planned

    @property
    def figures(self) -> dict[str, Any]:
        """All figures as plain values: counts, bytes, seconds, operations."""
        from tandem.plan.plan_page import as_json

        return as_json(self.planned)

    @property
    def text(self) -> str:
        """The tables that `tandem plan` prints."""
        from tandem.plan.plan_page import show_plan

        return printed(lambda console: show_plan(self.planned, console))

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return preformatted(self.text)


def loaded_recipe(recipe: AnyRecipe, overrides: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """Load a recipe with some values changed."""
    texts = [f"{key}={_text(key, value)}" for key, value in _flat(overrides, Recipe)]
    if isinstance(recipe, Recipe):
        return changed_recipe(recipe, texts)
    if not isinstance(recipe, str | PathLike):
        raise UserError(
            f"a recipe is a name, a file or a folder, or the recipe of a result, and this is a "
            f"{type(recipe).__name__}"
        )
    return load_recipe(fspath(recipe), texts)


def _flat(
    values: Mapping[str, Any], section: type[BaseModel], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a mapping for a section changes the keys that it has."""
    for key, value in values.items():
        at: type[BaseModel] | None = section
        for part in key.split("."):
            field = at.model_fields.get(part) if at else None
            many = field is not None and "tuple" in str(field.annotation)
            at = submodel(field.annotation) if field is not None and not many else None
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", exclude_unset=True)
        if at is not None and isinstance(value, Mapping):
            yield from _flat(value, at, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _text(key: str, value: Any) -> str:
    """A value as a command's key=value has it."""
    plain = fspath(value) if isinstance(value, PathLike) else value
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: the value {plain!r} is none that a recipe has: {error}") from None
