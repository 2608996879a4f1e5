"""`tandem.sft` and `tandem.dpo`: one stage each, which `tandem run` would run in the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from pydantic import BaseModel, ValidationError

from tandem.api.data import NamedData, named_data, rows_written
from tandem.api.generation import forget_model
from tandem.api.names import NOT_AS_TRL, SAME_AS_TRL, by_own_names
from tandem.api.result import Model, OnStep, Result, path_of
from tandem.api.session import open_console, prepare
from tandem.errors import UserError
from tandem.losses.custom import give_loss
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.explain_errors import explain
from tandem.recipe.recipe import Recipe
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import SftSettings, TrainingSettings
from tandem.stages.finished import settings_that_count
from tandem.storage.hashing import hash_json
from tandem.storage.run_folder import output_folder, stage_folder

if TYPE_CHECKING:
    from tandem.api.data import Data
    from tandem.api.options import DpoOptions, SftOptions

S = TypeVar("S", bound=BaseModel)

_SECTIONS: Mapping[TrainingStageName, type[TrainingSettings]] = {
    "sft": SftSettings,
    "dpo": DpoSettings,
}
# Keys of a run that describe the model it begins with, and the run itself.
_OF_THE_MODEL = frozenset({"model", "model_revision", "chat_template", "added_tokens"})
_OF_THE_RUN = frozenset({"name", "description", "output_dir"})
# What a stage that continues a run leaves out of its recipe.
_ALONE: Mapping[str, Any] = {"pairs": None, "evaluate": None, "rounds": 1}
# Keys of a run that a stage's result depends on.
_THAT_COUNT = ("model_revision", "chat_template", "added_tokens", "seed", "dtype", "quantization")
_DIGITS = 8  # of a hash in a folder's name


def sft(
    model: Model,
    data: Data,
    *,
    output_dir: str | PathLike[str] | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    **settings: Unpack[SftOptions],
) -> Result:
    """Fine-tune a model on conversations, raw text or tokens; an adapter, or all weights.

    A stage that is finished with the same inputs is recognised and returned at once; one that was
    interrupted goes on from its last checkpoint.

    Args:
        model: a Hub id, a folder, `demo:base`, or the result of an earlier stage.
        data: a path, a Hub id, `demo:NAME`, a list of rows, a `datasets.Dataset`, or a list of
            those; `tandem.source` gives one a weight or says what its columns mean.
        output_dir: the run's folder, in which the stage has its own. None: a folder in `runs`,
            named after model, data and a hash of the inputs: other inputs have another folder.
        quiet: print no progress.
        on_step: called with each logged line of metrics; ends the run if it returns "stop".
        settings: the keys of a recipe's `sft` section and of the recipe itself, such as
            `learning_rate`, `batch_size` (examples of one optimizer step, over all devices),
            `epochs`, `lora`, `seed`, `device`, `dtype`. TRL's names are taken where they mean the
            same.

    Raises UserError for mistakes, before anything is trained, and for an `output_dir` that holds
    a stage with other inputs. Raises Stopped after an interruption, when a checkpoint is written.
    """
    return _train("sft", model, data, output_dir, dict(settings), _Extras(quiet, on_step))


def dpo(
    model: Model,
    data: Data,
    *,
    output_dir: str | PathLike[str] | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    **settings: Unpack[DpoOptions],
) -> Result:
    """Align a model with preferences, by Direct Preference Optimization or another loss.

    The reference is the model as it is before the first step. In the `output_dir` of the result
    that it starts from, the stage becomes a part of that run: one recipe, one report.

    Args:
        model: a whole model: a Hub id, a folder, `demo:base`, or a merged result.
        data: preference pairs, or what else the loss compares; see `sft`.
        output_dir, quiet, on_step: see `sft`.
        settings: the keys of a recipe's `dpo` section and of the recipe itself, such as `beta`,
            `learning_rate`, `batch_size`, `lora`. `loss` is a name, a function, or a mapping of
            those to weights. A function is called as `loss(chosen, rejected, *, beta)` with
            `tandem.AnswerLogps` and returns the loss of each pair [P]; its keyword arguments are
            the settings that it uses. Keys of the run (`seed`, `device`, `dtype`, ...) that are
            left out are those of the result that the stage starts from.

    Raises what `sft` raises, and UserError for a loss that raises, has a wrong shape or is not
    finite, before anything is trained.
    """
    return _train("dpo", model, data, output_dir, dict(settings), _Extras(quiet, on_step))


@dataclass(frozen=True)
class _Extras:
    """What has no part in a stage's result."""

    quiet: bool
    on_step: OnStep | None


def _train(
    stage: TrainingStageName,
    model: Model,
    data: Any,
    output_dir: str | PathLike[str] | None,
    given: dict[str, Any],
    extras: _Extras,
) -> Result:
    section = _SECTIONS[stage]
    keys = [*section.model_fields, *RunSettings.model_fields]
    known = [key for key in keys if key not in ("data", "model", "output_dir")]
    named = by_own_names(stage, given, known, SAME_AS_TRL, NOT_AS_TRL)
    of_run = {key: named.pop(key) for key in [*named] if key in RunSettings.model_fields}
    if callable(loss := named.get("loss")) or isinstance(loss, Mapping):
        named["loss"] = _named_loss(loss)
    pieces, held_out = named_data(data, stage), _held_out(named, stage)
    # Settings are checked before rows are written; these paths are not read.
    scored = None if held_out is None else _paths(held_out)
    draft = _settings(stage, named, _paths(pieces), scored)
    start = _start(model, stage)
    run = _run_settings(start, of_run, stage)
    folder = _folder(output_dir, start, (stage, draft, pieces, held_out), run)
    beside, of_stage = folder / "data", stage_folder(folder, stage)
    with rows_written([*pieces, *(held_out or ())], beside, of_stage.exists):
        written = [piece.in_folder(beside, stage) for piece in pieces]
        if held_out is not None:
            scored = [piece.in_folder(beside, stage) for piece in held_out]
        settings = _settings(stage, named, written, scored)
        recipe = _recipe(start, stage, settings, run.model_copy(update={"output_dir": str(folder)}))
        return run_stage(Result(stage, recipe, extras.quiet), extras.on_step)


def run_stage(result: Result, on_step: OnStep | None = None) -> Result:
    """Run the stage of a result that is not there yet, as `tandem run` would; returns the result.

    The stages before it must be finished.
    """
    from tandem.api.step_callback import StepCallback
    from tandem.pipeline.run_pipeline import run_pipeline

    console = open_console(quiet=result.quiet)
    prepare(result.recipe, console)
    forget_model()
    callbacks = [] if on_step is None else [StepCallback(on_step)]
    run_pipeline(
        result.recipe, start=result.name, until=result.name, console=console, callbacks=callbacks
    )
    return result


def _named_loss(loss: Any) -> Any:
    if isinstance(loss, Mapping):
        return {give_loss(one) if callable(one) else one: weight for one, weight in loss.items()}
    return give_loss(loss)


def _held_out(named: dict[str, Any], call: str) -> list[NamedData] | None:
    """The data of the validation section, if it names some; it leaves the section."""
    validation = named.get("validation")
    if isinstance(validation, BaseModel):
        validation = validation.model_dump(mode="json", exclude_unset=True)
    if not isinstance(validation, Mapping) or "data" not in validation:
        return None
    named["validation"] = {key: value for key, value in validation.items() if key != "data"}
    return named_data(validation["data"], call)


def _paths(pieces: Sequence[NamedData]) -> list[dict[str, Any]]:
    """Data as a recipe has it, before rows are written."""
    return [{"path": f"{piece.title}.jsonl", **piece.settings} for piece in pieces]


def _settings(
    stage: TrainingStageName,
    named: Mapping[str, Any],
    data: list[dict[str, Any]],
    held_out: list[dict[str, Any]] | None,
) -> TrainingSettings:
    """The settings of a stage; raises UserError naming the keyword argument that is wrong."""
    values = {**named, "data": data}
    if held_out is not None:
        values["validation"] = {**values["validation"], "data": held_out}
    return validated(_SECTIONS[stage], values, f"{stage}()")


def validated(kind: type[S], values: Mapping[str, Any], call: str) -> S:
    """Make settings of Python values; raises UserError that explains which is wrong."""
    try:
        # JSON is where pydantic's strict mode takes a list for a tuple, yet no text for a number.
        return kind.model_validate_json(json.dumps(dict(values), default=_plain), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, kind, lambda _: call)) from None
    except TypeError as error:
        raise UserError(f"{call}: {error}") from None


def _plain(value: Any) -> Any:
    """A value as JSON has it: sections, paths, and numbers of numpy and torch."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which no setting is")


def _start(model: Model, stage: str) -> str | Result:
    """What a stage starts from; raises UserError for an adapter, which is no whole model."""
    if not isinstance(model, Result):
        return path_of(model, stage)
    if model.model is None:
        raise UserError(
            f"{stage}(): {model.folder} is an adapter, and training starts from a whole model. "
            "Give RESULT.merge(); to train the same adapter on, give its base and "
            "lora=tandem.LoRA(start=RESULT)"
        )
    return model


def _run_settings(start: str | Result, given: Mapping[str, Any], call: str) -> RunSettings:
    """The settings of the run; what is left out is as in the run that the stage starts from."""
    values: dict[str, Any] = {"model": start, "output_dir": ".", **given}
    if isinstance(start, Result):
        before = start.recipe.model_dump(mode="json", include=set(RunSettings.model_fields))
        kept = {k: v for k, v in before.items() if k not in _OF_THE_MODEL | _OF_THE_RUN}
        values = {**kept, **values, "model": str(start.folder)}
    return validated(RunSettings, values, f"{call}()")


def _folder(
    output_dir: str | PathLike[str] | None,
    start: str | Result,
    stage: tuple[TrainingStageName, TrainingSettings, list[NamedData], list[NamedData] | None],
    run: RunSettings,
) -> Path:
    """The run's folder: the one that is given, or one that is named after the inputs."""
    if output_dir is not None:
        return output_folder(Path(output_dir), "output_dir")
    from tandem.data.resolve_sources import data_identity
    from tandem.recipe.data_source import DataSource

    name, settings, pieces, held_out = stage

    def identity(some: Sequence[NamedData]) -> list[Any]:
        found: list[Any] = []
        for piece in some:
            source = DataSource.model_validate({"path": "rows", **piece.settings})
            own = [piece.digest, source.meaning, source.weight]
            by_name = piece.rows is not None or source.path.startswith("demo:")
            found.append([source.path, own] if by_name else data_identity([source]))
        return found

    inputs = {
        "stage": name,
        "model": run.model,
        "run": {key: run.model_dump(mode="json")[key] for key in _THAT_COUNT},
        "settings": settings_that_count(settings),
        "start": settings.lora.start,
        "data": identity(pieces),
        "held_out": None if held_out is None else identity(held_out),
    }
    base = start.recipe.model if isinstance(start, Result) else start
    words = [base.replace(":", "-").rstrip("/").rpartition("/")[2], name, pieces[0].name]
    return Path("runs", f"{'-'.join(words)}-{hash_json(inputs)[:_DIGITS]}")


def _recipe(
    start: str | Result, stage: TrainingStageName, settings: TrainingSettings, run: RunSettings
) -> Recipe:
    """The recipe of a stage alone, or of the run that it continues in the same folder."""
    folder = Path(run.output_dir)
    if (
        isinstance(start, Result)
        and stage == "dpo"
        and start.trained == "sft"
        and start.run_folder.resolve() == folder.resolve()
    ):
        return _continued(start, settings, run)
    values = {**dict(run), "name": run.name or folder.name, stage: settings}
    return Recipe.model_validate(values)


def _continued(start: Result, settings: TrainingSettings, run: RunSettings) -> Recipe:
    """The recipe of a run with preference training behind its SFT."""
    before = start.recipe
    for key in RunSettings.model_fields:
        if key in ("model", "output_dir"):
            continue
        own, new = getattr(before, key), getattr(run, key)
        left_out = key not in run.model_fields_set or (key in _OF_THE_RUN and not new)
        if new != own and not left_out:
            raise UserError(
                f"dpo(): {key} is {own!r} in the run {start.run_folder}, which this stage becomes "
                f"a part of; leave {key} out, or give the stage another output_dir"
            )
    whole = before.model_copy(update={"dpo": settings, **_ALONE})
    return Recipe.model_validate(dict(whole))


def until_its_stage(result: Result) -> Result:
    """A result whose recipe ends with its own stage."""
    gone: dict[str, Any] = {"evaluate": None, "rounds": result.in_round}
    if result.trained == "sft":
        gone |= {"pairs": None, "dpo": None}
    return replace(result, recipe=result.recipe.model_copy(update=gone))
