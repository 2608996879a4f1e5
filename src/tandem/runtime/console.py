"""Progress on the console: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich import progress
from rich.console import Console
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
    """A context manager that displays a training stage, which resumes at `start_step`.

    In a terminal it is a bar with the time left and the latest loss, margin and tokens per second;
    elsewhere one line for every step with metrics.
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
        self._task = progress.TaskID(0)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, metrics=""
            )
            self._bar.start()
        return self

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` steps are done; `metrics` are as in metrics.jsonl, if logged."""
        self._shown.update({k: v for k, v in (metrics or {}).items() if v is not None})
        if self._bar is not None:
            shown = _metrics(self._shown | self._scores)
            self._bar.update(self._task, completed=step, metrics=shown)
        elif metrics:
            log(self._console, self._line(step))

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show how held-out records scored after that many steps."""
        self._scores.update(metrics)
        if self._bar is not None:
            self._bar.update(self._task, metrics=_metrics(self._shown | self._scores))
        else:
            log(self._console, f"{self._title}: step {step}/{self._total}  {_metrics(metrics)}")

    def __exit__(self, *_: object) -> None:
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
    """Print a line as it is, without markup, and without line breaks in a file."""
    console.print(Text(text, style=style), soft_wrap=True)


def say_finished(console: Console, stage: str, folder: Path) -> None:
    """Say that a stage has nothing to do."""
    log(console, f"{stage}: {folder} is finished with these inputs; nothing to do")


@contextmanager
def phase(console: Console, text: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show another phase than training (reference pass, generation, encoding).

    Yields a function to call with the number of items just done; `total` is None if unknown.
    Outside a terminal there is a line every half minute and one at the end, even after an error.
    """
    if console.is_terminal:
        with _progress(console) as bar:
            task = bar.add_task(text, total=total, metrics="")
            yield lambda n: bar.advance(task, n)
        return
    began = printed = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, printed
        done += n
        if time.monotonic() - printed >= _LINE_EVERY:
            printed = time.monotonic()
            log(console, f"{text}: {_of(done, total)}")

    try:
        yield advance
    finally:
        seconds = time.monotonic() - began
        log(console, f"{text}: {_of(done, total)} in {seconds:.1f} s")


def _progress(console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}", style="bold", markup=False),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        progress.TextColumn("{task.fields[metrics]}", markup=False),
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
    """Return the console for progress and notices; it is quiet in all processes but rank 0."""
    return Console(stderr=True, highlight=False, quiet=launched().rank > 0)


def result_console() -> Console:
    """Return the console for a command's result."""
    return Console(highlight=False)
