"""`tandem.evaluate`: models side by side, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tandem.api.data import named_data
from tandem.api.generation import forget_model
from tandem.api.names import by_own_names
from tandem.api.pages import printed, table
from tandem.api.result import Model, path_of
from tandem.api.session import open_console, prepare, require_alone
from tandem.api.training import validated
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.jobs import EvaluationJob
from tandem.recipe.run_settings import RunSettings
from tandem.storage.run_folder import labels_of, model_in_run, output_folder

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.api.data import Data
    from tandem.api.options import EvaluationOptions
    from tandem.report.result_rows import Cell

_FOLDER = "runs/evaluation"  # as `tandem eval` has it
_OWN = ("questions", "pairs", "heldout")
_OF_THE_RUN = ("chat_template", "device", "dtype", "attention")
_ROWS = 20  # parsable rows that may tell what data is; the readers look at no more


def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    data: Data | None = None,
    *,
    questions: Data | None = None,
    pairs: Data | None = None,
    heldout: Data | None = None,
    output_dir: str | PathLike[str] = _FOLDER,
    quiet: bool = False,
    **settings: Unpack[EvaluationOptions],
) -> Evaluation:
    """Measure models side by side, with standard errors and differences from the first one.

    What is measured is kept in `output_dir`: the same call is answered from there, and another one
    measures only what is new.

    Args:
        models: results, folders or Hub ids; a mapping gives them names.
        data: held-out records, told by their columns: preference pairs, conversations, or
            questions with known answers (`question` and `answer`).
        questions, pairs, heldout: the same, where the columns do not tell.
        output_dir: where measurements are kept.
        quiet: print no progress.
        settings: the keys of a recipe's `evaluate` section (`tasks`, `suite`, `limit`,
            `max_new_tokens`, `samples`, `judge`, ...), and `chat_template` (for models without
            one), `device`, `dtype`, `attention`.

    Raises UserError for models and data that cannot be used.
    """
    from tandem.evaluate.evaluate_models import check_something, evaluate_models

    require_alone("evaluate")
    known = [*(k for k in EvaluationSettings.model_fields if k not in _OWN), *_OF_THE_RUN]
    named = by_own_names("evaluate", dict(settings), known, {}, {})
    of_run = {key: named.pop(key) for key in _OF_THE_RUN if key in named}
    labelled = _labelled(models)
    folder = output_folder(Path(output_dir), "output_dir")
    values = {"model": next(iter(labelled.values())), "output_dir": str(folder), "seed": 0}
    run = validated(RunSettings, {**values, **of_run}, "evaluate()")
    given = {"questions": questions, "pairs": pairs, "heldout": heldout}
    chosen: dict[str, list[Any]] = {key: [] for key in _OWN}
    for key, one in given.items():
        if one is not None:
            chosen[key] += _written(one, folder)
    for written in [] if data is None else _written(data, folder):
        chosen[_purpose(written, folder)].append(written)
    asked = {key: some for key, some in chosen.items() if some}
    checked = validated(EvaluationSettings, {"samples": 3, **named, **asked}, "evaluate()")
    check_something(checked)
    console = open_console(quiet=quiet)
    prepare(run, console)
    forget_model()
    job = EvaluationJob(run, checked, labelled, replace=True)
    return Evaluation(evaluate_models(job, console), folder)


@dataclass(frozen=True)
class Evaluation(Mapping[str, Mapping[str, Any]]):
    """What was measured: the figures of each model by its name, such as `[name]["loss"]`."""

    figures: dict[str, Any] = field(repr=False)  # the content of evaluation.json
    folder: Path  # where it is kept
    stages: bool = False  # whether the models are those of one run, each made of the one before

    def __getitem__(self, model: str) -> Mapping[str, Any]:
        """The figures of a model; `errors` has their standard errors."""
        models: dict[str, Mapping[str, Any]] = self.figures["models"]
        return models[model]

    def __iter__(self) -> Iterator[str]:
        """The models' names."""
        return iter(self.figures["models"])

    def __len__(self) -> int:
        """How many models were measured."""
        return len(self.figures["models"])

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Questions with the expected answer and each model's own."""
        return list(self.figures["samples"])

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        return list(self.figures["warnings"])

    @property
    def text(self) -> str:
        """The tables that `tandem eval` prints, or `tandem run` of a run's own evaluation."""
        from tandem.report.terminal_tables import comparison_table, result_table

        def write(console: Console) -> None:
            console.print((result_table if self.stages else comparison_table)(self.figures))
            for line in self._notes():
                console.print(line, markup=False, soft_wrap=True)

        return printed(write)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from tandem.report.result_rows import compared_rows, result_rows, shown_measures
        from tandem.result_warnings import MODEL_LABELS, model_names

        if self.stages:
            head = ["model", *(measure.title for measure in shown_measures(self.figures))]
            rows = [(row.label, *map(_cell, row.cells)) for row in result_rows(self.figures)]
        else:
            names = model_names(self.figures)
            head = ["measure", *(MODEL_LABELS.get(name, name) for name in names)]
            rows = [
                (f"{row.measure.title} {row.details}".strip(), *map(_cell, row.cells))
                for row in compared_rows(self.figures, "first")
            ]
        return table(rows, head) + "".join(f"<p>{escape(note)}</p>" for note in self._notes())

    def _notes(self) -> list[str]:
        from tandem.report.terminal_tables import comparison_notes

        notes = [] if self.stages else comparison_notes(self.figures)
        return [*notes, *(f"warning: {text}" for text in self.warnings)]


def _cell(cell: Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.arrow, cell.change, cell.note)))


def _labelled(models: Model | Sequence[Model] | Mapping[str, Model]) -> dict[str, str]:
    """The models' paths by their names in tables."""
    if isinstance(models, Mapping):
        return {label: model_in_run(path_of(model, "evaluate")) for label, model in models.items()}
    listed: list[Any] = [*models] if isinstance(models, list | tuple) else [models]
    if not listed:
        raise UserError("evaluate(): no models are given; give results, folders or Hub ids")
    paths = [model_in_run(path_of(model, "evaluate")) for model in listed]
    return dict(zip(labels_of(paths), paths, strict=True))


def _written(data: Any, folder: Path) -> list[dict[str, Any]]:
    """Data as a recipe names it; rows are written beside the evaluation's folder."""
    return [
        piece.in_folder(folder.parent / "data", "evaluate")
        for piece in named_data(data, "evaluate")
    ]


def _purpose(written: dict[str, Any], folder: Path) -> str:
    """Which data of an evaluation this is, by the keys of its first rows."""
    from tandem.data.formats.known_formats import detect, format_called
    from tandem.data.resolve_sources import resolve_sources
    from tandem.data.sources.chunks import Row
    from tandem.data.sources.rows import read_rows

    stated = validated(DataSource, written, "evaluate()")
    (source,) = resolve_sources([stated], folder.parent, 0)
    known = None if source.format is None else format_called(source.format)
    if known is None:
        rows = (row for row in read_rows(source) if isinstance(row, Row))
        found = (detect(row.fields) for row in islice(rows, _ROWS))
        known = next(filter(None, found), None)
    if known is None:
        raise UserError(
            f"evaluate(): the columns of {source.path} do not tell what it is; give it as "
            "questions=, pairs= or heldout="
        )
    if known.name == "question and answer":
        return "questions"
    return "pairs" if known.kind == "preference pairs" else "heldout"
