"""Progress on the console: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tandem.runtime.launch import launched

# Seconds between the lines of a long phase whose output goes to a file.
_LINE_EVERY = 30.0
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("eval_loss", "held-out loss", ".4f"),
    ("eval_rewards/margins", "held-out margin", ".3f"),
    ("eval_rewards/accuracies", "held-out accuracy", ".2f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


class StageProgress:
    """The display of a training stage, as a context manager.

    In a terminal a bar with the time left and the latest loss, margin and tokens per second;
    elsewhere one line for every step that brings metrics. `start_step` is where a resumed stage
    goes on from.
    """

    def __init__(self, console: Console, title: str, total_steps: int, start_step: int = 0) -> None:
        self._console = console
        self._title = title
        self._total = total_steps
        self._start = start_step
        self._shown: dict[str, float] = {}
        self._scores: dict[str, float] = {}
        self._began = time.monotonic()
        self._bar = _progress(console) if console.is_terminal else None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, metrics=""
            )
            self._bar.start()
        return self

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that `step` steps are done; `metrics` under the names of metrics.jsonl, if logged."""
        self._shown.update({k: v for k, v in (metrics or {}).items() if v is not None})
        if self._bar is not None:
            shown = _metrics(self._shown | self._scores)
            self._bar.update(self._task, completed=step, metrics=shown)
        elif metrics:
            self._console.print(Text(self._line(step)), soft_wrap=True)

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say how held-out records scored after that many steps."""
        self._scores.update(metrics)
        if self._bar is not None:
            self._bar.update(self._task, metrics=_metrics(self._shown | self._scores))
        else:
            text = f"{self._title}: step {step}/{self._total}  {_metrics(metrics)}"
            self._console.print(Text(text), soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, step: int) -> str:
        elapsed = time.monotonic() - self._began
        done = step - self._start
        left = elapsed / done * (self._total - step) if done > 0 else 0.0
        parts = [f"{self._title}: step {step}/{self._total}", _metrics(self._shown)]
        if done > 0 and step < self._total:
            parts.append(f"{_clock(left)} left")
        return "  ".join(part for part in parts if part)


def log(console: Console, text: str, *, style: str = "") -> None:
    """Print a line as it is: no markup in names, no break where a file has no width."""
    console.print(Text(text, style=style), soft_wrap=True)


def say_finished(console: Console, stage: str, folder: Path) -> None:
    """Say that a stage has nothing to do."""
    log(console, f"{stage}: {folder} is finished with these inputs; nothing to do")


@contextmanager
def phase(console: Console, text: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show another phase than training (reference pass, generation, encoding).

    Yields a function to be called with the number of items just done; `total` None means that
    nobody knows how many there will be. Outside a terminal a line every half minute and one at
    the end, also when the phase ends with an error.
    """
    if console.is_terminal:
        with _progress(console) as bar:
            task = bar.add_task(text, total=total, metrics="")
            yield lambda n: bar.advance(task, n)
        return
    began = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= _LINE_EVERY:
            said = time.monotonic()
            console.print(Text(f"{text}: {_of(done, total)}"), soft_wrap=True)

    try:
        yield advance
    finally:
        seconds = time.monotonic() - began
        console.print(Text(f"{text}: {_of(done, total)} in {seconds:.1f} s"), soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[metrics]}", markup=False),
        console=console,
        expand=True,
        refresh_per_second=4,
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {metrics[key]:{form}}" for key, name, form in _SHOWN if key in metrics
    )


def _of(done: int, total: int | None) -> str:
    return f"{done}" if total is None else f"{done}/{total}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def notice_console() -> Console:
    """The console for progress and notices; of several processes, rank 0 alone has one."""
    return Console(stderr=True, highlight=False, quiet=launched().rank > 0)


def result_console() -> Console:
    """The console for what a command is asked for."""
    return Console(highlight=False)
