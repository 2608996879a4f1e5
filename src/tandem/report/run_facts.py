"""Read every file of a run folder that the report uses, and note what is missing or damaged."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError
from tandem.result_warnings import ReportWarning, evaluation_warnings, mapping
from tandem.storage.atomic_files import read_json
from tandem.storage.hashing import hash_file, unsealed
from tandem.storage.run_folder import (
    KIND_TITLES,
    MOST_ROUNDS,
    ROUND_STAGES,
    TRAINING_STAGES,
    Stage,
    StageName,
    run_of,
    stages_in,
)
from tandem.wording import chosen_collapse

# Outputs of stages that a page shows, in part or whole.
_SHOWN = (
    "summary.json", "metrics.jsonl", "validation.jsonl", "samples.jsonl", "data-ledger.jsonl",
    "pairs.jsonl", "pairs.parquet", "evaluation.json",
)  # fmt: skip
# The stages of each section of a recipe.
_SECTION_STAGES: dict[str, tuple[StageName, ...]] = {
    "sft": ("sft", "sft-merge"),
    "pairs": ("pairs",),
    "dpo": ("dpo", "dpo-merge"),
    "evaluate": ("evaluate",),
}
LEDGER_LINES_SHOWN = 25
# The losses of stages whose settings name none.
_USUAL_LOSSES = {"sft": "nll", "dpo": "sigmoid"}


@dataclass(frozen=True)
class StageFacts:
    """One stage folder: `kind` is sft, merge, pairs, dpo or evaluate."""

    name: str
    title: str
    kind: str
    folder: Path
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    ledger: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    validation: tuple[Mapping[str, Any], ...] = ()
    in_round: int = 1
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def status(self) -> str:
        """`finished`, `running` (or interrupted), `unknown` without a manifest."""
        return str(self.manifest.get("status", "unknown"))


@dataclass(frozen=True)
class RunFacts:
    """A run folder, or a single stage's; `missing` are stages the recipe asks for."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    recipe_text: str
    recipe: Mapping[str, Any]
    stages: tuple[StageFacts, ...]
    missing: tuple[Stage, ...]
    evaluation: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    known: tuple[Stage, ...] = ()  # the stages whose folders it has; none for a single stage's

    @property
    def trained(self) -> list[StageFacts]:
        """Its training stages."""
        return [stage for stage in self.stages if stage.kind in TRAINING_STAGES]

    @property
    def base_model(self) -> str:
        """The base model: the recipe's, else the one that its first training stage names."""
        return str(self.recipe.get("model") or next(map(_base_model, self.trained), ""))


def read_run(folder: Path) -> RunFacts:
    """Read a run folder, or one stage's, finished or not.

    Raises UserError if the folder does not exist or has nothing of tandem's. A file that cannot be
    parsed does not stop the report: it is listed in `problems`.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. Give the folder of a run, such as runs/demo."
        )
    problems: list[str] = []
    known = tuple(stages_in(folder))
    recipe_file = folder / "recipe.yaml"
    if known or recipe_file.exists():
        stages = tuple(_read_stage(folder / stage.folder, stage) for stage in known)
        manifest = _object(folder / "manifest.json", problems)
    elif (folder / "manifest.json").exists() or (folder / "metrics.jsonl").exists():
        stages, manifest = (_read_stage(folder, None),), {}
    else:
        raise UserError(
            f"{folder} holds no run of tandem: no recipe.yaml, no manifest.json and no stage "
            f"folder such as 1-sft. Give the folder of a run, such as runs/demo."
        )
    if known and not recipe_file.exists():
        problems.append("recipe.yaml is missing")
    elif (recorded := manifest.get("recipe")) is not None and (
        not recipe_file.is_file() or hash_file(recipe_file) != recorded
    ):
        problems.append("recipe.yaml is not as the run left it: it was changed")
    recipe_text, recipe = _recipe(recipe_file, problems)
    evaluations = [s.folder / "evaluation.json" for s in stages if s.kind == "evaluate"]
    return RunFacts(
        name=str(recipe.get("name") or folder.resolve().name),
        folder=folder,
        manifest=manifest,
        recipe_text=recipe_text,
        recipe=recipe,
        stages=stages,
        missing=tuple(stage for stage in _wanted(recipe) if stage not in known),
        evaluation=_object(evaluations[0], problems) if evaluations else {},
        problems=tuple(problems + [p for s in stages for p in s.problems]),
        known=known,
    )


def _wanted(recipe: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that a recipe asks for."""
    rounds = recipe.get("rounds")
    if not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
        rounds = 1
    return [
        Stage(work, number)
        for section, works in _SECTION_STAGES.items()
        if recipe.get(section)
        for work in works
        if not (work.endswith("-merge") and mapping(recipe[section]).get("full"))
        for number in range(1, rounds + 1 if work in ROUND_STAGES else 2)
    ]


def warnings_of_run(run_dir: Path) -> list[ReportWarning]:
    """Return the `run_warnings` of a folder; raise UserError if it has nothing of tandem's."""
    return run_warnings(read_run(run_dir))


def run_warnings(facts: RunFacts) -> list[ReportWarning]:
    """Return all warnings and notes of a run, warnings first."""
    seen = [ReportWarning("warning", "unreadable file", text) for text in facts.problems]
    for stage in facts.stages:
        warnings = stage.summary.get("warnings")
        texts = list(warnings) if isinstance(warnings, list) else []
        if stage.kind == "dpo" and not any("collapse" in str(text).lower() for text in texts):
            beta = find_key(stage.manifest.get("inputs"), "beta")
            if (collapse := chosen_collapse(stage.metrics, beta)) is not None:
                texts.append(collapse)
        seen += [ReportWarning("warning", stage.title, str(text)) for text in texts]
        if stage.status == "running":
            text = (
                "It is running, or it was interrupted; the same command resumes from its last "
                "checkpoint. The figures below are those so far."
            )
            seen.append(ReportWarning("note", f"{stage.title} is not finished", text))
    seen += evaluation_warnings(facts.evaluation)
    if facts.missing:
        names = ", ".join(f"{one.title} ({one.folder})" for one in facts.missing)
        text = f"The recipe also asks for: {names}. Not there yet."
        seen.append(ReportWarning("note", "partial run", text))
    return sorted(seen, key=lambda one: one.level != "warning")


def _base_model(stage: StageFacts) -> str:
    """Return the model that a training stage started from, as the manifest names it."""
    for part in ("schedule", "inputs"):
        for key in ("base", "model"):
            name = mapping(stage.manifest.get(part)).get(key)
            if isinstance(name, str):
                return name
    return ""


def find_key(value: object, key: str) -> Any:
    """Return the first value under `key` anywhere in nested plain data, None without one."""
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        value = list(value.values())
    values = (find_key(inner, key) for inner in value) if isinstance(value, list) else ()
    return next((inner for inner in values if inner is not None), None)


def _read_stage(folder: Path, known: Stage | None) -> StageFacts:
    problems: list[str] = []
    manifest = _object(folder / "manifest.json", problems)
    if not (folder / "manifest.json").exists() and any(folder.iterdir()):
        problems.append(
            f"{_shown(folder / 'manifest.json')} is missing: whether it is finished is unknown"
        )
    metrics = _lines(folder / "metrics.jsonl", problems)
    kind = known.kind if known else _kind(folder, manifest, metrics)
    problems += _changed(folder, mapping(manifest.get("outputs")))
    return StageFacts(
        name=known.folder if known else folder.resolve().name,
        title=_title(kind, loss_names(kind, manifest), known),
        kind=kind,
        folder=folder,
        manifest=manifest,
        summary=_object(folder / "summary.json", problems),
        metrics=metrics,
        ledger=_lines(folder / "data-ledger.jsonl", problems, LEDGER_LINES_SHOWN),
        validation=_lines(folder / "validation.jsonl", problems),
        samples=_lines(folder / "samples.jsonl", problems),
        problems=tuple(problems),
        in_round=known.round if known else 1,
    )


def loss_names(kind: str, manifest: Mapping[str, Any]) -> list[str]:
    """Return the losses that a training stage was given; none where it has its usual one."""
    found = mapping(mapping(manifest.get("inputs")).get("settings")).get("loss")
    names = list(found) if isinstance(found, Mapping) else [found] if isinstance(found, str) else []
    return [] if names == [_USUAL_LOSSES.get(kind)] else list(map(str, names))


def _title(kind: str, losses: Sequence[str], known: Stage | None) -> str:
    """Return a stage's title. Only the usual loss of pairs is Direct Preference Optimization."""
    title = KIND_TITLES.get(kind, kind)
    if losses:
        title = f"{'Preference training' if kind == 'dpo' else title} ({', '.join(losses)})"
        return known.titled(title) if known else title
    return known.title if known else title


def _kind(folder: Path, manifest: Mapping[str, Any], metrics: tuple[Any, ...]) -> str:
    stage = str(manifest.get("stage", ""))
    if stage in KIND_TITLES:
        return stage
    if stage.startswith("eval") or (folder / "evaluation.json").exists():
        return "evaluate"
    if metrics:
        return "dpo" if any("rewards/margins" in m for m in metrics) else "sft"
    return stage or "unknown"


def _changed(folder: Path, outputs: Mapping[str, Any]) -> list[str]:
    """Return a line on each shown output that changed after its stage finished."""
    return [
        f"{_shown(folder / name)} is not as the stage left it: it is missing, damaged or changed"
        for name in _SHOWN
        if name in outputs
        and (not (folder / name).is_file() or hash_file(folder / name) != outputs[name])
    ]


def _shown(path: Path) -> str:
    """A file's path from its run's folder on, or with the name of the folder it is in."""
    return str(path.relative_to(run_of(path.parent)))


def _object(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        value = read_json(path)
        value = unsealed(value) if isinstance(value, dict) else value
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{_shown(path)} cannot be read: {error}")
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{_shown(path)} holds no JSON object")
    return mapping(value)


def _lines(path: Path, problems: list[str], limit: int | None = None) -> tuple[Any, ...]:
    if not path.is_file():
        if path.exists() or path.is_symlink():
            problems.append(f"{_shown(path)} is no file")
        return ()
    lines: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for row, line in enumerate(file, start=1):
            if limit is not None and len(lines) >= limit:
                break
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.append(f"{_shown(path)}, row {row}: {error}")
                continue
            if isinstance(value, Mapping):
                lines.append(value)
            else:
                problems.append(f"{_shown(path)}, row {row}: no JSON object")
    return tuple(lines)


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """The value of a YAML text, which a run asks for at the end of each stage."""
    return yaml.safe_load(text)


def _recipe(path: Path, problems: list[str]) -> tuple[str, Mapping[str, Any]]:
    if not path.is_file():
        if path.exists() or path.is_symlink():
            problems.append("recipe.yaml is no file")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = _parsed(text)
        if not isinstance(value, Mapping):
            problems.append("recipe.yaml holds no recipe")
        return text, mapping(value)
    except yaml.YAMLError as error:
        problems.append(f"recipe.yaml cannot be read: {error}")
        return text, {}
