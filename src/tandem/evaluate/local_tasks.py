"""Task data in local files: found, and described to the harness as tasks of ours."""

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
from tandem.evaluate.task_forms import FORMS, Form, Rows
from tandem.storage.atomic_files import atomic_write_text
from tandem.storage.hashing import hash_files

_OPENERS: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.decompress, ".gz": gzip.decompress}


@dataclass(frozen=True)
class LocalData:
    """A task's files: (subject, evaluated file, file of few-shot examples or None).

    Only MMLU has subjects; elsewhere the one entry's is empty.
    """

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


def find_data(folder: Path, name: str) -> LocalData | None:
    """A task's files in a folder, None if there are none.

    Raises UserError if the folder is not there.
    """
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
    """Describe a local task to the harness: YAML files that its `--include_path` reads as well.

    Args:
        data: the task's files.
        harness_name: the task's name there, or the group's.
        shots: few-shot examples; None leaves it to the harness (none).
        folder: where the files go.
    """
    members = []
    for subject, evaluated, examples in data.parts:
        name = f"{harness_name}_{subject}" if subject else harness_name
        members.append(name)
        task = {
            "task": name,
            "custom_dataset": "!function tandem.evaluate.local_tasks.load_rows",
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
    """What the harness calls for a local task's data: a `datasets.DatasetDict`.

    Its splits are `test` and, if there is a file of them, `examples`.
    """
    from datasets import Dataset, DatasetDict

    found = {"test": Dataset.from_list(read_rows(FORMS[form], Path(evaluated)))}
    if examples is not None:
        found["examples"] = Dataset.from_list(read_rows(FORMS[form], Path(examples)))
    return DatasetDict(found)


def read_rows(form: Form, path: Path) -> Rows:
    """A task file's rows.

    Raises UserError for a file of another form, with the row where it can be told.
    """
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
    # A tag of the harness's, which a safe dump would write as text in quotes.
    return re.sub(r"'(!function [\w.]+)'", r"\1", text)
