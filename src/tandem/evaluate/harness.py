"""lm-evaluation-harness: one task at a time on one model, without its output.

The harness loads the model and computes the scores, as its own command line does.
"""

from __future__ import annotations

import difflib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from tandem.errors import UserError
from tandem.evaluate.scores import Score, score_of
from tandem.evaluate.suites import Task
from tandem.model.model_folder import first_line

# Called with 0 and the number of requests, then with how many more are done.
Advance = Callable[[int, int | None], None]
# The first of these that a task outside the suite has is shown.
_PREFERRED = ("acc_norm,none", "acc,none")


@dataclass(frozen=True)
class HarnessModel:
    """The model to measure, as the harness is to load it."""

    # a model folder, or a loaded model where the harness cannot load it as it was trained (an
    # adapter on a quantised base)
    pretrained: Any
    adapter: Path | None  # an adapter's folder on top of the model folder, or None
    tokenizer: Any  # loaded, with its chat template
    dtype: str  # of the weights, by name
    device: str  # by torch's name
    batch_size: str  # as the harness takes it: a number, or `auto`
    # called with the token ids of each text; raises UserError for those that cannot be fed
    check: Callable[[Sequence[int]], None] | None = None


@dataclass(frozen=True)
class TaskScores:
    """What a task gave."""

    metrics: dict[str, Score]  # by `metric,filter`
    metric: str  # the one that tables show
    shots: int  # few-shot examples
    cut: int  # requests that were longer than the model's context; their beginning was cut off
    version: str  # of the task's definition
    seconds: float  # how long it took

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file; see `task_scores_of`."""
        return {**vars(self), "metrics": {k: s.as_json() for k, s in self.metrics.items()}}


def task_scores_of(plain: dict[str, Any]) -> TaskScores:
    """Scores from what `TaskScores.as_json` gave."""
    metrics = {name: score_of(score) for name, score in plain["metrics"].items()}
    return TaskScores(**{**plain, "metrics": metrics})


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a task that the harness does not have, with the nearest that it has."""
    if not names:
        return
    with _quietly(lambda *_: None, offline=False):
        there = _own_manager().all_tasks
    for name in names:
        if name not in there:
            raise _unknown(name, there)


def _manager(folder: Path) -> Any:
    """The index of the tasks that a folder describes."""
    from lm_eval.tasks import TaskManager

    folder.mkdir(parents=True, exist_ok=True)
    return TaskManager(include_path=str(folder), include_defaults=False)


@lru_cache(maxsize=1)
def _own_manager() -> Any:
    """The index of the harness's own tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(name: str, there: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return UserError(
        f"tasks: the harness has no task {name}. {hint}`lm-eval ls tasks` lists all there are."
    )


class Harness:
    """A model that the harness loads with the first task, as a context manager."""

    def __init__(self, model: HarnessModel, tasks: Path, *, hub: bool) -> None:
        """Take a folder of local tasks; `hub`: whether tasks with data on the Hub follow."""
        self.model, self.hub, self._tasks = model, hub, tasks
        self._model: Any = None
        self._index: Any = None

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the model."""
        self._model = None

    def measure(self, task: Task, *, limit: int | None, chat: bool, advance: Advance) -> TaskScores:
        """Measure a task; `limit`: its first items only, `chat`: prompts through the chat template.

        Few-shot examples are turns then. Raises UserError for an unknown task, and for data that
        cannot be read.
        """
        started = time.monotonic()
        with _quietly(advance, offline=task.data is not None) as cut:
            self._load(task)
            name = task.harness_name
            from lm_eval import simple_evaluate

            try:
                results = simple_evaluate(
                    model=self._model, tasks=[name], limit=limit, task_manager=self._index,
                    num_fewshot=None if task.data is not None else task.shots,
                    batch_size=self.model.batch_size, device=self.model.device,
                    apply_chat_template=chat, fewshot_as_multiturn=chat,
                )  # fmt: skip
            except UserError:
                raise
            except (OSError, ImportError, LookupError, ValueError, AssertionError) as error:
                raise UserError(_why(task, error)) from error
        return _scores(task, name, results, len(cut), time.monotonic() - started)

    def _load(self, task: Task) -> None:
        from lm_eval.models.huggingface import HFLM

        if self._index is None:
            self._index = _own_manager() if self.hub else _manager(self._tasks)
        if task.harness_name not in self._index.all_tasks:
            raise _unknown(task.name, self._index.all_tasks)
        if self._model is None:
            self._model = HFLM(
                pretrained=self.model.pretrained,
                tokenizer=self.model.tokenizer,
                dtype=self.model.dtype,
                device=self.model.device,
                batch_size=self.model.batch_size,
                **({} if self.model.adapter is None else {"peft": str(self.model.adapter)}),
            )
            if self.model.check is not None:
                _check_tokens(self._model, self.model.check)


def _check_tokens(model: Any, check: Callable[[Sequence[int]], None]) -> None:
    """Have the harness's model pass the token ids of each text to `check`, which may raise."""
    one, several = model.tok_encode, model.tok_batch_encode

    def encode(*args: Any, **settings: Any) -> Any:
        ids = one(*args, **settings)
        check(ids)
        return ids

    def encode_batch(*args: Any, **settings: Any) -> Any:
        ids, mask = several(*args, **settings)
        check(ids.flatten().tolist())
        return ids, mask

    model.tok_encode, model.tok_batch_encode = encode, encode_batch


def _why(task: Task, error: Exception) -> str:
    hint = (
        "Its data comes from the Hub: check the network, or name local data."
        if task.data is None
        else "Check the task's files, and that there are more items than few-shot examples."
    )
    return f"tasks: {task.name} cannot be measured: {first_line(error)}. {hint}"


def _scores(task: Task, name: str, results: Any, cut: int, seconds: float) -> TaskScores:
    """The harness's figures, with the items of each metric that has one value an item."""
    # A group's figures are under its own name, its items under its members'.
    figures = results["results"].get(name) or results.get("groups", {}).get(name)
    if figures is None:
        raise UserError(
            f"tasks: {task.name} is a set of tasks without a score of its own; name its tasks"
        )
    samples = [
        (member, sample) for member, rows in sorted(results["samples"].items()) for sample in rows
    ]
    metrics = {}
    for key, value in figures.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{chosen}")
        items = {
            f"{member}/{sample['doc_id']}": float(sample[metric])
            for member, sample in samples
            if sample["filter"] == chosen and isinstance(sample.get(metric), int | float)
        }
        stated = (float(value), float(error) if isinstance(error, int | float) else None)
        metrics[key] = Score(tuple(items), tuple(items.values()), (), stated)
    if not metrics:
        raise UserError(f"tasks: {task.name} gave no figure")
    metric = task.metric or next((m for m in _PREFERRED if m in metrics), next(iter(metrics)))
    shots = {int(n) for n in results.get("n-shot", {}).values()}
    version = results.get("versions", {}).get(name)
    return TaskScores(metrics, metric, max(shots, default=0), cut, str(version), seconds)


@contextmanager
def _quietly(advance: Advance, *, offline: bool) -> Iterator[list[str]]:
    """The harness without its output, warnings and look-ups; yields its lines about cut requests.

    Its bars become ours. It would also start programs to note its commit and the machine's
    packages, and ask the Hub about the model.
    """
    cut: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Only code of the harness and its libraries runs here.
        warnings.simplefilter("ignore")
        stack.enter_context(_logged(cut))
        stand_ins: dict[str, Any] = {
            "lm_eval.api.task.tqdm": _bar(advance),
            "lm_eval.models.huggingface.tqdm": _bar(advance),
            "lm_eval.api.model.tqdm": _bar(advance),
            "lm_eval.evaluator.get_git_commit_hash": lambda *_: None,
            "lm_eval.evaluator.add_env_info": lambda *_: None,
            "lm_eval.models.huggingface.HFLM.get_model_info": lambda _: {},
        }
        if offline:
            stand_ins["huggingface_hub.constants.HF_HUB_OFFLINE"] = True
            stand_ins["datasets.config.HF_HUB_OFFLINE"] = True
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(name, stand_in))
        for library in ("transformers.utils.logging", "datasets"):
            import_module(library).disable_progress_bar()
        yield cut


@contextmanager
def _logged(cut: list[str]) -> Iterator[None]:
    """Drop the harness's log but for lines about requests that it cuts."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "maximum length" in text or "truncation applied" in text:
                cut.append(text)

    log = logging.getLogger("lm_eval")
    before = log.handlers[:], log.propagate, log.level
    log.handlers, log.propagate = [Listener(logging.WARNING)], False
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[1]
        log.setLevel(before[2])


def _bar(advance: Advance) -> type:
    """What stands in for tqdm: it tells `advance` about requests, and draws nothing."""

    class Bar:
        def __init__(
            self, iterable: Iterable[Any] = (), total: int | None = None, desc: str = "", **_: Any
        ) -> None:
            self.iterable = iterable
            self.counts = desc.startswith("Running")
            if self.counts:
                advance(0, total)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.iterable)

        def update(self, count: int = 1) -> None:
            if self.counts:
                advance(count, None)

        def close(self) -> None:
            pass

    return Bar
