"""The tasks of an evaluation: the leaderboard's suite, others by name, and where their data is.

Local files of task data are found here and described to the harness as tasks of ours.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.evaluate import task_forms
from tandem.evaluate.task_forms import FIRST_PLACE, FORMS, Rows, TaskForm
from tandem.recipe.choices import SUITES
from tandem.storage.atomic_files import atomic_write_text
from tandem.storage.hashing import hash_files

_OPENERS: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.decompress, ".gz": gzip.decompress}
NOT_COMPARABLE = (
    "few-shot examples are drawn from the evaluated file itself, the item that is asked left out: "
    "not comparable with the leaderboard's scores"
)


@dataclass(frozen=True)
class TaskInfo:
    """A task of the suite: title, few-shot examples, the harness's metric and filter."""

    name: str
    title: str
    shots: int
    metric: str


# The Open LLM Leaderboard's first version, as its page described it.
LEADERBOARD = (
    TaskInfo("arc_challenge", "ARC-challenge", 25, "acc_norm,none"),
    TaskInfo("hellaswag", "HellaSwag", 10, "acc_norm,none"),
    TaskInfo("mmlu", "MMLU", 5, "acc,none"),
    TaskInfo("truthfulqa_mc2", "TruthfulQA mc2", 0, "acc,none"),
    TaskInfo("winogrande", "Winogrande", 5, "acc,none"),
    TaskInfo("gsm8k", "GSM8K", 5, "exact_match,strict-match"),
)
_SUITE = {task.name: task for task in LEADERBOARD}
# Tasks outside the suite with a title and a main metric of their own.
_OTHERS = {"arc_easy": TaskInfo("arc_easy", "ARC-easy", 0, "acc_norm,none")}


@dataclass(frozen=True)
class LocalData:
    """A task's files: (MMLU's subject or "", evaluated file, file of few-shot examples or None)."""

    form: str
    parts: tuple[tuple[str, Path, Path | None], ...]

    @property
    def names(self) -> list[str]:
        """The files' names, for people."""
        if len(self.parts) > 1:
            return [f"{len(self.parts)} files in {self.parts[0][1].parent}"]
        return [path.name for path in self.files]

    @property
    def files(self) -> list[Path]:
        """All files."""
        return [path for _, *paths in self.parts for path in paths if path is not None]

    @property
    def has_examples(self) -> bool:
        """Whether few-shot examples have files of their own."""
        return all(examples is not None for _, _, examples in self.parts)

    @property
    def identity(self) -> str:
        """Hash of the files' names and contents."""
        return hash_files(self.files)


@dataclass(frozen=True)
class Task:
    """One task to be measured."""

    name: str  # as it was asked for; the name in results
    title: str  # for tables
    metric: str  # the harness's `metric,filter` that the tables show; empty: the task's first
    shots: int | None  # few-shot examples; None: what the task itself says
    data: LocalData | None  # local data; None: the harness's own definition, with data from the Hub
    notes: tuple[str, ...] = ()  # what a reader of the score must know

    @property
    def of_suite(self) -> bool:
        """Whether it is one of the leaderboard's."""
        return self.name in _SUITE

    @property
    def harness_name(self) -> str:
        """What the harness calls the task."""
        return self.name if self.data is None else f"{self.name}_local"


@dataclass(frozen=True)
class TaskSelection:
    """The tasks, and the suite's tasks that cannot be measured, each with the reason."""

    tasks: tuple[Task, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def needs_hub(self) -> bool:
        """Whether any task's data comes from the Hub."""
        return any(task.data is None for task in self.tasks)


def select_tasks(
    names: Sequence[str], suite: str | None, folder: Path | None, shots: int | None
) -> TaskSelection:
    """The tasks of a suite, then the harness's tasks and groups of these names.

    `folder` has local task data; None takes all from the Hub. `shots` are few-shot examples of each
    task, in place of the suite's or the task's own; tasks that have none by definition keep none.

    Raises UserError for an unknown suite, and for a named task without data in `folder`; a suite's
    tasks without data there are in `left_out`.
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"there is no suite {suite!r}; it may be {', '.join(SUITES)}")
    tasks: list[Task] = []
    left_out = []
    for known in LEADERBOARD if suite else ():
        data = None if folder is None else find_data(folder, known.name)
        if folder is not None and data is None:
            left_out.append((known.title, f"{folder} has no {FORMS[known.name].files}"))
            continue
        tasks.append(_task(known.name, data, shots))
    for name in names:
        if any(task.name == name for task in tasks):
            continue
        if folder is not None and name not in FORMS:
            raise UserError(
                f"tasks: {name} has no local form; those that have are {', '.join(FORMS)}. Leave "
                "out the local data, and the harness fetches its own from the Hub."
            )
        data = None if folder is None else find_data(folder, name)
        if folder is not None and data is None:
            raise UserError(f"tasks: {name}: {folder} has no {FORMS[name].files}")
        tasks.append(_task(name, data, shots))
    if suite and not tasks:
        raise UserError(f"{folder} has data for none of the suite's tasks")
    return TaskSelection(tuple(tasks), tuple(left_out))


def _task(name: str, data: LocalData | None, shots: int | None) -> Task:
    of_suite = _SUITE.get(name)
    known = of_suite or _OTHERS.get(name) or TaskInfo(name, name, 0, "")
    wanted = of_suite.shots if of_suite else None
    if shots is not None and wanted != 0:
        wanted = shots
    notes = []
    if data is not None:
        notes.append(f"local data: {', '.join(data.names)}")
        if FORMS[name].note:
            notes.append(FORMS[name].note)
        if wanted and not data.has_examples:
            notes.append(NOT_COMPARABLE)
    if of_suite and wanted != of_suite.shots:
        notes.append(f"{wanted} few-shot examples, the leaderboard has {of_suite.shots}")
    return Task(name, known.title, known.metric, wanted, data, tuple(notes))


def find_data(folder: Path, name: str) -> LocalData | None:
    """A task's files in a folder, None if there are none; UserError if the folder is not there."""
    if not folder.is_dir():
        raise UserError(f"task data: {folder} is no folder. Check the path.")
    form = FORMS[name]
    if name == "mmlu":
        return _subjects(folder / "mmlu", name)
    evaluated = _first(folder, form.evaluated)
    if evaluated is None:
        return None
    return LocalData(name, (("", evaluated, _first(folder, form.examples)),))


def write_tasks(data: LocalData, harness_name: str, shots: int | None, folder: Path) -> None:
    """Describe a local task to the harness: YAML files that its `--include_path` reads as well."""
    members = []
    for subject, evaluated, examples in data.parts:
        name = f"{harness_name}_{subject}" if subject else harness_name
        members.append(name)
        task = {
            "task": name,
            "custom_dataset": "!function tandem.evaluate.suites.load_rows",
            "dataset_kwargs": {
                "form": data.form,
                "evaluated": str(evaluated.resolve()),
                "examples": None if examples is None else str(examples.resolve()),
            },
            "test_split": "test",
            "fewshot_split": "test" if examples is None else "examples",
            **FORMS[data.form].task,
            **({} if shots is None else {"num_fewshot": shots}),
        }
        if subject:
            about = subject.replace("_", " ")
            task["description"] = (
                f"The following are multiple choice questions (with answers) about {about}.\n\n"
            )
        atomic_write_text(folder / f"{name}.yaml", _yaml(task))
    if data.parts[0][0]:
        group = {
            "group": harness_name,
            "task": members,
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }
        atomic_write_text(folder / f"{harness_name}.yaml", _yaml(group))


def load_rows(*, form: str, evaluated: str, examples: str | None, **_: Any) -> Any:
    """The harness calls this for a local task's data: splits `test` and maybe `examples`."""
    from datasets import Dataset, DatasetDict

    splits = {"test": Dataset.from_list(read_rows(FORMS[form], Path(evaluated)))}
    if examples is not None:
        splits["examples"] = Dataset.from_list(read_rows(FORMS[form], Path(examples)))
    return DatasetDict(splits)


def read_rows(form: TaskForm, path: Path) -> Rows:
    """A task file's rows; UserError, with the row where it is known, for a file of another form."""
    try:
        content = _OPENERS.get(path.suffix, bytes)(path.read_bytes())
        rows = form.read(content.decode("utf-8-sig"))
    except (ValueError, csv.Error, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path} is not {form.files}: {error}. Check the file.") from None
    if not rows:
        raise UserError(f"{path} has no items.")
    return rows


def _subjects(folder: Path, name: str) -> LocalData | None:
    names = {path.name.rpartition("_test.csv")[0] for path in (folder / "test").glob("*_test.csv*")}
    parts = []
    for subject in sorted(names):
        path = _first(folder / "test", (f"{subject}_test.csv",))
        if path is not None:
            parts.append((subject, path, _first(folder / "dev", (f"{subject}_dev.csv",))))
    return LocalData(name, tuple(parts)) if parts else None


def _first(folder: Path, patterns: Sequence[str]) -> Path | None:
    for pattern in patterns:
        for suffix in ("", *_OPENERS):
            if (path := folder / f"{pattern}{suffix}").is_file():
                return path
    return None


def _yaml(value: dict[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)
    # The harness's tag must not be quoted, as a safe dump does.
    text = re.sub(r"'(!function [\w.]+)'", r"\1", text)
    return text.replace(FIRST_PLACE, task_forms.__name__)
