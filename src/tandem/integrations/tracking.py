"""Follows a stage in trackers: what goes to its files goes to them, once and in order."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.integrations.trackers import TRACKERS, TrackedRun, check_tracker
from tandem.recipe.run_settings import RunSettings
from tandem.storage.atomic_files import atomic_write_json, read_json, read_jsonl
from tandem.storage.run_folder import run_of, stage_at
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun

# What each tracker has got so far, in the stage's folder.
_STATE = "trackers.json"
# Scores are known before the line of their step.
_FILES = ("validation.jsonl", "metrics.jsonl")
# Seconds after which a tracker that failed is tried again; doubled at each failure.
_PAUSE = 30.0

# A line's step, and its place among those of the step.
_Place = tuple[int, int]


@dataclass(frozen=True)
class _Line:
    """What a tracker is to get."""

    place: _Place
    values: Mapping[str, float]


@dataclass
class _Tracker:
    """One tracker: what it has got, and what it has not."""

    name: str
    known_as: str | None = None
    got: _Place = (-1, 0)  # the last line that it has
    waiting: list[_Line] = field(default_factory=list)
    running: Any = None  # accelerate's tracker
    pause: float = _PAUSE
    again_at: float = 0.0  # when it may be tried again
    error: str = ""  # why lines wait


class Tracking(Callback):
    """Sends settings, metrics, held-out scores and the summary to trackers, from rank 0.

    A tracker that fails keeps nothing from training: its lines wait, and are sent when it works
    again. One that is resumed, or named later, gets the lines that it lacks from the stage's files.
    """

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._trackers = [_Tracker(name) for name in settings.trackers]
        self._open = False

    def check(self) -> None:
        """Raise UserError for a tracker whose package or login is not here."""
        for tracker in self._trackers:
            check_tracker(tracker.name)

    def on_train_begin(self, run: TrainingRun) -> None:
        """Start the trackers; raises UserError where one cannot be started for a new run."""
        if self._trackers:
            run.on_rank0(lambda: self._begin(run))

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Send a logged step's line."""
        if report.metrics:
            self._take(run, report.metrics, "metrics.jsonl")

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """Send the last step's line."""
        self.on_step_end(run, report)

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        """Send held-out scores."""
        self._take(run, scores, "validation.jsonl")

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Send the summary's figures; what a tracker has not got is one of its warnings."""
        values = {f"summary/{key}": value for key, value in flat(summary).items()}
        for tracker in self._trackers if self._open else ():
            tracker.waiting.append(_Line((run.state.step, len(_FILES)), _numbers(values)))
            tracker.again_at = 0.0
            self._send(run, tracker)
            if tracker.waiting:
                lost = f"{_in_words(tracker)} and has not got the summary ({tracker.error})"
                run.log(f"warning: {lost}")
                summary.setdefault("warnings", []).append(lost)
        if self._open:
            self._keep(run)

    def on_close(self, run: TrainingRun) -> None:
        """End the trackers' runs."""
        for tracker in self._trackers:
            if tracker.running is None:
                continue
            running, tracker.running = tracker.running, None
            try:
                with redirect_stdout(sys.stderr):
                    TRACKERS[tracker.name].finish(running)
            except Exception as error:
                run.log(f"tracker {tracker.name} could not be ended ({_said(error)})")

    def _begin(self, run: TrainingRun) -> None:
        """Find what each tracker has got before, and send what it lacks."""
        state = _read_state(run.folder / _STATE)
        lines = sorted(
            (
                _line(values, place)
                for place, name in enumerate(_FILES)
                for values in read_jsonl(run.folder / name)
            ),
            key=lambda line: line.place,
        )
        self._open = True
        for tracker in self._trackers:
            if before := state.get(tracker.name):
                tracker.known_as, tracker.got = before
            tracker.waiting = [line for line in lines if line.place > tracker.got]
            new = tracker.known_as is None and run.state.step == 0
            self._send(run, tracker, silent=new)
            self._keep(run)
            if tracker.error and new:
                raise UserError(
                    f"trackers: {tracker.name} cannot be started ({tracker.error}). Mend it, or "
                    "leave it out: the same command then goes on"
                )

    def _take(self, run: TrainingRun, values: Mapping[str, float], file: str) -> None:
        """Send a line; before `on_train_begin` it is in its file, and read from there."""
        for tracker in self._trackers if self._open else ():
            line = _line(values, _FILES.index(file))
            if line.place > tracker.got:
                tracker.waiting.append(line)
            self._send(run, tracker)
        if self._open:
            self._keep(run)

    def _send(self, run: TrainingRun, tracker: _Tracker, *, silent: bool = False) -> None:
        """Start a tracker if need be, and send what waits for it, unless it failed just now."""
        if time.monotonic() < tracker.again_at:
            return
        spec = TRACKERS[tracker.name]
        try:
            with redirect_stdout(sys.stderr):  # some print to where results go
                if tracker.running is None:
                    self._start(run, tracker)
                while tracker.waiting:
                    line = tracker.waiting[0]
                    values = {spec.named(key): value for key, value in line.values.items()}
                    tracker.running.log(values, step=line.place[0])
                    tracker.got = line.place
                    del tracker.waiting[0]
        except Exception as error:
            if not tracker.error and not silent:
                run.log(
                    f"warning: tracker {tracker.name} failed at step {run.state.step} "
                    f"({_said(error)}). Training goes on, and {' and '.join(_FILES[::-1])} have "
                    "what it lacks; it is tried again"
                )
            tracker.error = _said(error)
            tracker.again_at = time.monotonic() + tracker.pause
            tracker.pause *= 2
        else:
            if tracker.error:
                run.log(f"tracker {tracker.name} works again, and has what it lacked")
            tracker.error, tracker.pause, tracker.again_at = "", _PAUSE, 0.0

    def _start(self, run: TrainingRun, tracker: _Tracker) -> None:
        spec, job = TRACKERS[tracker.name], run.job
        tracked = tracked_run(self._settings, run.stage, run.folder, tracker.known_as)
        running = spec.start(tracked)
        new = tracker.known_as is None
        tracker.known_as = spec.id_of(running)
        tracker.running = running
        if new or spec.forgets:
            settings = job.run.model_dump(mode="json", exclude={"description"})
            settings[run.stage] = job.settings.model_dump(mode="json")
            running.store_init_configuration(
                {spec.named(key): value for key, value in flat(settings).items()}
            )
        if new:
            run.log(f"tracked by {tracker.name}: {tracked.project}, {tracked.name}")

    def _keep(self, run: TrainingRun) -> None:
        state = {one.name: {"run": one.known_as, "got": one.got} for one in self._trackers}
        kept = _read_json(run.folder / _STATE)
        try:
            atomic_write_json(run.folder / _STATE, kept | state)
        except OSError as error:
            run.log(f"warning: what trackers have got cannot be recorded ({error})")


def tracked_run(
    settings: RunSettings, stage: str, folder: Path, known_as: str | None
) -> TrackedRun:
    """What trackers call a stage: the recipe's name, and the run's folder with the stage."""
    known = stage_at(folder)
    whole = folder if known is None else run_of(folder)
    name = settings.tracker_run or whole.absolute().name
    project = settings.tracker_project or settings.name or "tandem"
    return TrackedRun(
        project,
        f"{name}-{known.name if known else stage}",
        folder / "trackers",
        whole / "trackers",
        known_as,
    )


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as dotted keys; lists become JSON, and null a word, as trackers need it."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        elif isinstance(value, str | int | float | bool):
            found[f"{above}{key}"] = value
        else:
            found[f"{above}{key}"] = json.dumps(value, ensure_ascii=False)
    return found


def _line(values: Mapping[str, float], file: int) -> _Line:
    rest = {key: value for key, value in values.items() if key != "step"}
    return _Line((int(values["step"]), file), _numbers(rest))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _in_words(tracker: _Tracker) -> str:
    lines: Sequence[_Line] = [line for line in tracker.waiting if line.place[1] < len(_FILES)]
    what = f"tracker {tracker.name} lacks "
    if not lines:
        return f"{what}no line"
    first, last = lines[0].place[0], lines[-1].place[0]
    return f"{what}{len(lines)} lines, of steps {first} to {last},"


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}"


def _read_state(path: Path) -> dict[str, tuple[str, _Place]]:
    """Each tracker's id of the run, and the last line that it has got; what is damaged is new."""
    state: dict[str, tuple[str, _Place]] = {}
    for name, one in _read_json(path).items():
        match one:
            case {"run": str(known_as), "got": [int(step), int(file)]}:
                state[name] = (known_as, (step, file))
    return state


def _read_json(path: Path) -> dict[str, Any]:
    read: Callable[[Path], Any] = read_json
    try:
        value = read(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
