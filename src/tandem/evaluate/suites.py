"""Which tasks an evaluation has: the leaderboard's suite, others by name, data from where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import UserError
from tandem.evaluate.local_tasks import LocalData, find_data
from tandem.evaluate.task_forms import FORMS
from tandem.recipe.choices import SUITES

NOT_COMPARABLE = (
    "few-shot examples are drawn from the evaluated file itself, the item that is asked left out: "
    "not comparable with the leaderboard's scores"
)


@dataclass(frozen=True)
class Measured:
    """A task of the suite: title, few-shot examples, the harness's metric and filter."""

    name: str
    title: str
    shots: int
    metric: str


# The Open LLM Leaderboard's first version, as its page described it.
LEADERBOARD = (
    Measured("arc_challenge", "ARC-challenge", 25, "acc_norm,none"),
    Measured("hellaswag", "HellaSwag", 10, "acc_norm,none"),
    Measured("mmlu", "MMLU", 5, "acc,none"),
    Measured("truthfulqa_mc2", "TruthfulQA mc2", 0, "acc,none"),
    Measured("winogrande", "Winogrande", 5, "acc,none"),
    Measured("gsm8k", "GSM8K", 5, "exact_match,strict-match"),
)
_SUITE = {task.name: task for task in LEADERBOARD}
# What is no part of the suite, and has a title and a main metric all the same.
_OTHERS = {"arc_easy": Measured("arc_easy", "ARC-easy", 0, "acc_norm,none")}


@dataclass(frozen=True)
class TaskPlan:
    """One task to be measured.

    Attributes:
        name: as it was asked for; the name in results.
        title: for tables.
        metric: the harness's `metric,filter` that the tables show; empty: the task's first.
        shots: few-shot examples; None: what the task itself says.
        data: local data; None: the harness's own definition, with data from the Hub.
        notes: what a reader of the score must know.
    """

    name: str
    title: str
    metric: str
    shots: int | None
    data: LocalData | None
    notes: tuple[str, ...] = ()

    @property
    def of_suite(self) -> bool:
        """Whether it is one of the leaderboard's."""
        return self.name in _SUITE

    @property
    def harness_name(self) -> str:
        """What the harness calls the task."""
        return self.name if self.data is None else f"{self.name}_local"


@dataclass(frozen=True)
class Plan:
    """The tasks, and the suite's tasks that cannot be measured, each with the reason."""

    tasks: tuple[TaskPlan, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def needs_hub(self) -> bool:
        """Whether any task's data comes from the Hub."""
        return any(task.data is None for task in self.tasks)


def plan_tasks(
    names: Sequence[str], suite: str | None, folder: Path | None, shots: int | None
) -> Plan:
    """The tasks of a suite, then those asked for by name.

    Args:
        names: harness tasks and groups.
        suite: `leaderboard-v1`, or None.
        folder: local task data; None takes all from the Hub.
        shots: few-shot examples of every task, in place of the suite's or the task's own. Tasks
            that have none by definition keep none.

    Raises UserError for an unknown suite, and for a task that has no data in `folder`. The
    suite's own tasks without data there are left out, and said.
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"suite: {suite!r} is none; there is {', '.join(SUITES)}")
    tasks: list[TaskPlan] = []
    left_out = []
    for known in LEADERBOARD if suite else ():
        found = None if folder is None else find_data(folder, known.name)
        if folder is not None and found is None:
            left_out.append((known.title, f"{folder} has no {FORMS[known.name].files}"))
            continue
        tasks.append(_task(known.name, found, shots))
    for name in names:
        if any(task.name == name for task in tasks):
            continue
        if folder is not None and name not in FORMS:
            raise UserError(
                f"tasks: {name} has no local form; those that have are {', '.join(FORMS)}. Leave "
                "out the local data, and the harness fetches its own from the Hub."
            )
        found = None if folder is None else find_data(folder, name)
        if folder is not None and found is None:
            raise UserError(f"tasks: {name}: {folder} has no {FORMS[name].files}")
        tasks.append(_task(name, found, shots))
    if suite and not tasks:
        raise UserError(f"{folder} has data for none of the suite's tasks")
    return Plan(tuple(tasks), tuple(left_out))


def _task(name: str, data: LocalData | None, shots: int | None) -> TaskPlan:
    of_suite = _SUITE.get(name)
    known = of_suite or _OTHERS.get(name) or Measured(name, name, 0, "")
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
    return TaskPlan(name, known.title, known.metric, wanted, data, tuple(notes))
