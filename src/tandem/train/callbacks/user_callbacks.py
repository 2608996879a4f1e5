"""Functions of the user's own, told what happens; they may ask for a stop, and may fail."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tandem.errors import UserError
from tandem.runtime.user_code import load_function
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.train.callbacks.event import EventKind, TrainingEvent

_STOP = "stop"
_LATER = "Mend it, and the same command resumes from there"


@dataclass(frozen=True)
class _Answer:
    """What one function did with an event."""

    stops: bool = False
    error: str = ""  # what it raised, and where


@dataclass
class UserCallbacks(Callback):
    """Calls functions named `module:function` with a `TrainingEvent`, in rank 0 alone.

    A function that returns "stop" ends the run with a checkpoint, to be resumed. One that raises
    ends it with an error, after a checkpoint as well.
    """

    named: Sequence[str]
    _functions: list[Callable[[TrainingEvent], Any]] = field(default_factory=list)

    def check(self) -> None:
        """Import the functions; see `load_function` for what it raises."""
        self._functions = [load_function(name, "callbacks") for name in self.named]

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Tell of a logged step."""
        if report.metrics:
            self._tell(run, "step", report.metrics)

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """Tell of the last step."""
        self.on_step_end(run, report)

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        """Tell of held-out scores; nothing is trained yet if they are those before the first step.

        Raises UserError where a function fails then.
        """
        self._tell(run, "scores", scores)
        if run.failure and run.state.step == 0:
            run.engine.processes.raise_on_all(
                UserError(f"{run.failure}, before the first step. Mend it, and start again")
            )

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Tell of a checkpoint; who asks for a stop then needs no other one."""
        self._tell(run, "checkpoint", {})
        # All processes have the same answers.
        run.stopping |= bool(run.stop_reason or run.failure)

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Tell of the end; raises UserError where a function fails."""
        self._tell(run, "end", summary)
        if run.failure:
            run.engine.processes.raise_on_all(
                UserError(
                    f"{run.failure}, at the end of the stage. All steps are taken, and the last "
                    f"checkpoint has them. {_LATER}"
                )
            )

    def _tell(self, run: TrainingRun, kind: EventKind, metrics: Mapping[str, Any]) -> None:
        if not self.named:
            return
        event = TrainingEvent(
            kind, run.stage, run.state.step, run.total_steps, run.epoch,
            MappingProxyType(dict(metrics)), run.folder, run.checkpoint,
        )  # fmt: skip
        answers = run.on_rank0(lambda: [_ask(function, event) for function in self._functions])
        for name, answer in zip(self.named, answers, strict=True):
            if answer.error:
                run.fail(f"callbacks: {name} {answer.error} when told of {_in_words(event)}")
            elif answer.stops:
                run.ask_to_stop(f"callback {name} asked for it")


def _ask(function: Callable[[TrainingEvent], Any], event: TrainingEvent) -> _Answer:
    try:
        said = function(event)
    except (Exception, SystemExit) as error:
        return _Answer(error=f"raised {type(error).__name__}: {error} ({_where(function, error)})")
    if said is None or (isinstance(said, str) and said == _STOP):
        return _Answer(stops=said is not None)
    return _Answer(error=f'returned {said!r:.60}, but may return "{_STOP}" or nothing')


def _where(function: Callable[..., Any], error: BaseException) -> str:
    """The line of the user's file, also where the error comes from another library's."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without this file
    try:
        own = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that is called
        own = inspect.getsourcefile(type(function))
    frame = next((one for one in reversed(frames) if one.filename == own), None)
    if frame is None and frames:
        frame = frames[-1]
    return f"{frame.filename}, line {frame.lineno}" if frame else "when it was called"


def _in_words(event: TrainingEvent) -> str:
    what = {"scores": "the scores at ", "checkpoint": "the checkpoint of ", "end": "the end, "}
    return f"{what.get(event.kind, '')}step {event.step}"
