"""What a training stage or a merge left behind: a folder, read when it is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tandem.errors import UserError, nearest
from tandem.recipe.choices import DtypeName, StageName, TrainingStageName
from tandem.recipe.load_recipe import recipe_to_yaml
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import MergeSettings, TrainingSettings
from tandem.storage.atomic_files import (
    atomic_folder,
    atomic_write_text,
    read_json,
    read_jsonl,
)
from tandem.storage.hashing import hash_file
from tandem.storage.manifest import read_manifest
from tandem.storage.run_folder import Stage, stage_folder
from tandem.wording import count, duration

if TYPE_CHECKING:
    from tandem.api.generation import Messages
    from tandem.api.pages import Html, Page
    from tandem.report.training_section import Figure

# Outputs that report what was done, beside those that make the model.
_REPORTED = frozenset({"summary.json", "metrics.jsonl", "validation.jsonl", "data-ledger.jsonl"})


@dataclass(frozen=True)
class Result:
    """A finished training stage, or the merge of its adapter.

    It is the path of its folder as well: `AutoModelForCausalLM.from_pretrained(result)` loads it.
    """

    stage: StageName  # sft, sft-merge, dpo or dpo-merge
    recipe: Recipe  # the recipe that does the same, as far as this stage
    quiet: bool = field(default=False, repr=False, compare=False)  # whether merging prints nothing
    in_round: int = 1  # of a run that repeats its preference training

    @property
    def name(self) -> str:
        """What `tandem run` calls the stage: `dpo`, and in the second round `dpo-2`."""
        return Stage(self.stage, self.in_round).name

    @property
    def run_folder(self) -> Path:
        """The folder of the run that the stage is a part of."""
        return Path(self.recipe.output_dir)

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return stage_folder(self.run_folder, self.stage, self.in_round)

    @property
    def trained(self) -> TrainingStageName:
        """The training stage that it comes from."""
        return "sft" if self.stage in ("sft", "sft-merge") else "dpo"

    @property
    def settings(self) -> TrainingSettings:
        """The settings of that training stage."""
        settings = self.recipe.sft if self.trained == "sft" else self.recipe.dpo
        assert settings is not None
        return settings

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter; None where all weights were trained."""
        return None if self.settings.full else self._trained_folder

    @property
    def model(self) -> Path | None:
        """The folder of the whole model; None for an adapter that is not merged yet."""
        return self.folder if self.settings.full or self.stage.endswith("-merge") else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one for every `logging_steps` steps, the last at the end."""
        return self._lines("metrics.jsonl")

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The scores of held-out records on the way; empty without a validation section."""
        return self._lines("validation.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage's summary.json says: counts, seconds, bytes, warnings."""
        summary: dict[str, Any] = read_json(self.folder / "summary.json")
        return summary

    @property
    def warnings(self) -> list[str]:
        """What the stage has warned of."""
        return list(self.summary.get("warnings", ()))

    @property
    def recipe_yaml(self) -> str:
        """The recipe as YAML. `tandem run` on it finds this stage finished.

        A loss that is a function of a notebook has no module that could be imported: such a recipe
        says so in its first lines.
        """
        names = self.recipe.dpo.losses if self.recipe.dpo is not None else {}
        own = [name for name in names if name.startswith("__main__:") or "<" in name]
        note = "".join(
            f"# {name} is a function of a script or notebook: put it into a file such as "
            f"my_losses.py,\n# and write my_losses:{name.rpartition(':')[2]} here.\n"
            for name in own
        )
        return note + recipe_to_yaml(self.recipe)

    def save_recipe(self, path: str | PathLike[str]) -> Path:
        """Write the recipe to a file, which `tandem run` takes; returns its path."""
        atomic_write_text(Path(path), self.recipe_yaml)
        return Path(path)

    def merge(self, *, dtype: DtypeName | None = None) -> Result:
        """Merge the adapter into its base, verified, unless it is merged; returns the whole model.

        A merged model, and one whose weights were all trained, is returned as it is.

        Args:
            dtype: number format of the merged weights; None: the run's own, which is the base's
                unless an earlier merge of the run has another.

        Raises UserError for a base that is not the adapter's, a merge that fails its check, and a
        dtype that is not the run's.
        """
        if self.model is not None:
            if dtype not in (None, self.recipe.merge.dtype):
                raise UserError(f"merge(): {self.folder} is a whole model already; leave dtype out")
            return self
        recipe = self.recipe
        if dtype not in (None, recipe.merge.dtype):
            if self.trained == "dpo" and recipe.sft is not None and not recipe.sft.full:
                raise UserError(
                    f"merge(): dtype is {recipe.merge.dtype} in the run {self.run_folder}, whose "
                    "merges all have one; leave it out, or give dpo() another output_dir"
                )
            assert dtype is not None
            recipe = recipe.model_copy(update={"merge": MergeSettings(dtype=dtype)})
        from tandem.api.training import run_stage

        stage: StageName = "sft-merge" if self.trained == "sft" else "dpo-merge"
        return run_stage(replace(self, stage=stage, recipe=recipe))

    @overload
    def generate(
        self,
        asked: str | Messages,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        asked: list[str],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        asked: str | Messages | list[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Answer a question, a conversation, or each of several questions.

        Answers are those of the model with its chat template. The model stays in memory until
        another one answers, or a stage runs.

        Args:
            asked: a text, turns (`{"role": "user", "content": "..."}`), or a list of texts.
            max_new_tokens: tokens of an answer at most.
            temperature: 0 takes the likeliest token; above it, tokens are drawn.
            top_p: share of the probability that is drawn from, the likeliest tokens first.
            seed: of the random numbers that draw.

        Raises UserError for turns that are none, and for a conversation beyond the context.
        """
        from tandem.api.generation import answers
        from tandem.api.session import require_alone

        require_alone("generate")
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise UserError(
                "generate(): max_new_tokens must be at least 1, temperature 0 or more, and top_p "
                f"above 0 and at most 1, not {max_new_tokens}, {temperature} and {top_p}"
            )
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
        several = not isinstance(asked, str) and all(isinstance(one, str) for one in asked)
        questions: Any = asked if several else [asked]
        texts = answers(str(self.folder), self.recipe.device, questions, sampling)
        return texts if several else texts[0]

    def charts(self, *titles: str) -> Html:
        """Return charts of the report by their titles, all without any; a notebook shows them.

        Raises UserError for a title that no chart of the stage has.
        """
        from tandem.api.pages import Html, charts

        drawn = self._figures()
        for title in titles:
            if title not in drawn:
                raise UserError(
                    f"charts(): there is no chart {title!r}.{nearest(title, drawn)} "
                    f"Charts: {', '.join(drawn)}"
                )
        chosen = [drawn[title] for title in titles or drawn]
        return Html(charts((one.title, one.caption, one.svg) for one in chosen))

    def report(self) -> Page:
        """Write the run's report.html anew and return it; a notebook shows the page."""
        from tandem.api.pages import Page
        from tandem.report.html import write_report

        return Page(write_report(self.run_folder))

    def save(self, folder: str | PathLike[str]) -> Path:
        """Copy the model, or the adapter where it is not merged, to a folder of its own.

        Returns the folder. It has what transformers or peft load, and the model's card if it has
        one. A copy that is there already stays; UserError is raised for a folder with other files.
        """
        target = Path(folder).expanduser()
        manifest = read_manifest(self.folder)
        outputs = [] if manifest is None else [*manifest["outputs"], "README.md"]
        names = [one for one in outputs if one not in _REPORTED and (self.folder / one).is_file()]
        if target.is_dir() and all(_is_copy(target / one, self.folder / one) for one in names):
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"save(): {target} is there, and not a copy of {self.folder}; name another folder"
            )
        with atomic_folder(target) as aside:
            for name in names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, aside / name)
        return target

    def __fspath__(self) -> str:
        """The stage's folder."""
        return fspath(self.folder)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts()[2:])
        return f"<{self.name} {self.folder}{': ' if facts else ''}{facts}>"

    def _repr_html_(self) -> str:
        from tandem.api.pages import charts, table

        rows = [*self._facts(), *(("warning", text) for text in self.warnings)]
        drawn = self._figures() if self.stage == self.trained and len(self.metrics) > 1 else {}
        shown = [drawn[title] for title in ("Loss", "Reward margin") if title in drawn]
        return table(rows) + charts((one.title, one.caption, one.svg) for one in shown)

    @property
    def _trained_folder(self) -> Path:
        return stage_folder(self.run_folder, self.trained, self.in_round)

    def _figures(self) -> dict[str, Figure]:
        """The charts of the training stage, by title."""
        from tandem.report.run_facts import read_run
        from tandem.report.training_section import curves

        run = read_run(self.run_folder)
        stages = [one for one in run.stages if one.folder == self._trained_folder]
        return {figure.title: figure for stage in stages for figure in curves(stage)}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self._trained_folder / name
        return read_jsonl(path) if path.exists() else []

    def _facts(self) -> list[tuple[str, str]]:
        """What a table says of it, as (name, value)."""
        rows = [("stage", self.name), ("folder", str(self.folder))]
        summary = self.summary if (self.folder / "summary.json").is_file() else {}
        if "steps" in summary:
            rows += [("steps", count(summary["steps"])), ("examples", count(summary["examples"]))]
            rows.append(("training", duration(summary["train_seconds"])))
        lines = self.metrics if self.stage == self.trained else []
        if lines and "loss" in lines[0]:
            rows.append(("loss", f"{lines[0]['loss']:.4f} → {lines[-1]['loss']:.4f}"))
        if lines and "rewards/accuracies" in lines[-1]:
            rows.append(("reward accuracy", f"{lines[-1]['rewards/accuracies']:.0%}"))
        return rows


def path_of(model: Any, call: str) -> str:
    """A model's folder or Hub id; raises UserError for an object that is loaded already."""
    if isinstance(model, str | PathLike):
        return fspath(model)
    raise UserError(
        f"{call}(): the model is a {type(model).__name__}; give a Hub id, a folder or a result, "
        "which is loaded as it is needed"
    )


def _is_copy(path: Path, of: Path) -> bool:
    return path.is_file() and hash_file(path) == hash_file(of)


Model = str | PathLike[str] | Result
"""A base model as the functions take it: a Hub id, a folder, `demo:base`, or a result."""

OnStep = Callable[[Mapping[str, float]], object]
"""Called with each logged line of metrics; `"stop"` in return ends the run with a checkpoint."""
