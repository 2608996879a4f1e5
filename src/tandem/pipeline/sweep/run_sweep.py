"""A sweep: the stages before DPO once, then DPO with each combination of values; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.resolve_sources import resolve_sources
from tandem.errors import NotFinite, Stopped, TandemError, UserError
from tandem.pipeline.preflight import check_inputs, check_training
from tandem.pipeline.run_pipeline import joined, run_pipeline, run_training
from tandem.pipeline.stage_jobs import dpo_job
from tandem.pipeline.sweep.grid import Grid, Trial
from tandem.pipeline.sweep.results import check_halving, write_results
from tandem.pipeline.sweep.state import (
    END,
    Halving,
    TrialState,
    check_begun,
    ranked,
    state_of,
    store_of,
)
from tandem.pipeline.sweep.winner import check_take, take
from tandem.recipe.choices import BestMetric
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.recipe import Recipe, stages_of
from tandem.runtime.console import log
from tandem.runtime.process_group import ProcessGroup
from tandem.storage.folder_lock import folder_lock
from tandem.storage.manifest import is_finished
from tandem.train.pauses import pause_name, pause_steps


@dataclass(frozen=True)
class SweepOptions:
    """How trials are compared, and what becomes of the best."""

    metric: BestMetric = "accuracy"
    halving: Halving | None = None
    take: bool = False  # whether the best trial becomes the run's DPO stage


def run_sweep(grid: Grid, options: SweepOptions, console: Console) -> dict[str, Any]:
    """Run what is left of a sweep, and compare its trials; returns what sweep.json says.

    All processes of a launcher call it: they train together, and rank 0 alone does the rest. A
    trial whose loss is not finite is kept as failed, and the others go on.

    Raises UserError for mistakes in any trial before anything is trained, and Stopped where the run
    is interrupted.
    """
    processes = joined(grid.shared)
    if not processes.is_rank0:
        console = Console(quiet=True)
    sweep = _Sweep(grid, options, console, processes)
    with processes.shared_fate():
        processes.rank0_alone(sweep.check)
        sweep.run_shared()
        lock = folder_lock(grid.folder, sweep.log)
        processes.on_rank0(lock.__enter__)
        try:
            processes.on_rank0(sweep.write)
            sweep.run_trials()
            return processes.on_rank0(sweep.finish)
        finally:
            if processes.is_rank0:
                lock.__exit__(None, None, None)


def shared_stages(recipe: Recipe) -> list[str]:
    """The stages before DPO, which all trials share."""
    names: list[str] = [stage.name for stage in stages_of(recipe)]
    return names[: names.index("dpo")]


def trial_job(trial: Trial) -> TrainingJob:
    """The DPO stage of a trial: that of its recipe, in the trial's own folder."""
    job = dpo_job(trial.recipe)
    root, seed, settings = Path(trial.recipe.output_dir), trial.recipe.seed, job.settings
    # Embedded data lies in the run's folder, beside the stage that the run itself would make.
    changes: dict[str, Any] = {"data": tuple(resolve_sources(settings.data, root, seed))}
    if settings.validation is not None:
        named = tuple(resolve_sources(settings.validation.data, root, seed))
        changes["validation"] = settings.validation.model_copy(update={"data": named})
    own: dict[str, Any] = {"output_dir": str(trial.folder)}
    if job.run.tracker_run is not None:  # or all trials would be called the same
        own["tracker_run"] = f"{job.run.tracker_run}-{trial.name}"
    run = job.run.model_copy(update=own)
    return TrainingJob(run, settings.model_copy(update=changes))


@dataclass(frozen=True)
class _Sweep:
    """A running sweep."""

    grid: Grid
    options: SweepOptions
    console: Console
    processes: ProcessGroup

    def log(self, text: str) -> None:
        """Log a line of the sweep."""
        log(self.console, f"sweep: {text}")

    def check(self) -> None:
        """Raise UserError for what would stop any of the trials."""
        grid, options = self.grid, self.options
        check_begun(grid)
        check_halving(grid, options.halving, options.metric)
        states = self._states()
        for trial in grid.trials if options.halving is not None else ():
            assert options.halving is not None
            if trial.recipe.dpo is not None and trial.recipe.dpo.max_steps is not None:
                pause_steps(options.halving.shares, trial.recipe.dpo.max_steps)
        if options.take:
            check_take(grid, states)
        wanted = {*shared_stages(grid.shared), "dpo"}
        root: dict[str, Path] = {stage.name: stage.folder for stage in stages_of(grid.shared)}
        finished = {name for name in wanted - {"dpo"} if is_finished(root[name])}
        if all(state.finished for state in states):
            finished.add("dpo")
        check_inputs(grid.trials[0].recipe, wanted, finished)
        for state in states:
            if not state.finished:
                check_training(state.trial.recipe)

    def run_shared(self) -> None:
        """Run the stages before DPO as `tandem run` does."""
        if shared := shared_stages(self.grid.shared):
            run_pipeline(self.grid.shared, until=shared[-1], start=None, console=self.console)

    def run_trials(self) -> None:
        """Run every trial to its end, or to the comparison that stops it."""
        going = list(self.grid.trials)
        halving = self.options.halving
        for share in [] if halving is None else halving.shares:
            assert halving is not None
            going = self._compare(self._round(going, share), share, halving)
        self._round(going, None)

    def finish(self) -> dict[str, Any]:
        """Write the comparison; the best trial becomes the run's DPO stage where that was asked."""
        results = self.write(complete=True)
        if self.options.take and results["best"] is not None:
            best = next(one for one in self.grid.trials if one.name == results["best"])
            self.log(take(best))
        return results

    def _round(self, trials: Sequence[Trial], share: float | None) -> list[Trial]:
        """Run trials up to a share of their steps, or to their ends; returns those not failed."""
        going = []
        for trial in trials:
            number = 1 + self.grid.trials.index(trial)
            if self._run(trial, number, share):
                going.append(trial)
            self.processes.on_rank0(self.write)
        return going

    def _compare(self, trials: list[Trial], share: float, halving: Halving) -> list[Trial]:
        """The trials that go on, in the order of the list."""
        if not trials:
            return []

        def choose() -> list[str]:
            states = [state for state in self._states() if state.trial in trials]
            order = ranked(states, self.options.metric, pause_name(share))
            names = [state.trial.name for state in order[: halving.survivors(len(order))]]
            self.log(f"after {share:.3g} of the steps go on: {', '.join(names)}")
            return names

        chosen = self.processes.on_rank0(choose)
        return [trial for trial in trials if trial.name in chosen]

    def _run(self, trial: Trial, number: int, share: float | None) -> bool:
        """Run one trial as far as it should; returns whether it has come there."""
        from tandem.train.callbacks.record_scores import RecordScores

        store, halving = store_of(self.grid.folder, self.log), self.options.halving

        def look() -> tuple[bool, str]:
            state = state_of(trial, store)
            at = END if share is None else pause_name(share)
            return state.finished or state.scores(at) is not None, state.failure

        title = f"trial {number} of {len(self.grid.trials)}: {trial.name}"
        self.console.rule(title, align="left")
        there, failure = self.processes.on_rank0(look)
        if failure:
            self.log(f"{trial.folder} failed: {failure}")
            return False
        if there and share is not None:
            self.log(f"{trial.folder} has come to {share:.3g} of its steps")
            return True
        job = self.processes.on_rank0(partial(trial_job, trial))
        shares = [] if halving is None else halving.shares
        scores = RecordScores(store, trial.name, shares, share)
        try:
            run_training("dpo", job, self.console, [scores])
        except TandemError as error:
            if error.exit_code == Stopped.exit_code and scores.paused:
                return True
            if error.exit_code != NotFinite.exit_code:
                raise
            self._fail(trial, error)
            return False
        return True

    def _fail(self, trial: Trial, error: TandemError) -> None:
        """Keep a trial as failed; raises any other error than a loss that is not finite."""
        # The process that found it has the error itself, the others are told of it.
        if not self.processes.any_rank(isinstance(error, NotFinite)):
            raise error
        store = store_of(self.grid.folder, self.log)
        self.processes.on_rank0(lambda: state_of(trial, store).fail(str(error)))
        self.log(f"{trial.folder} failed: {error}")

    def _states(self) -> list[TrialState]:
        store = store_of(self.grid.folder, self.log)
        return [state_of(trial, store) for trial in self.grid.trials]

    def write(self, *, complete: bool = False) -> dict[str, Any]:
        """Write the comparison as it is now."""
        metric, halving = self.options.metric, self.options.halving
        return write_results(self.grid, self._states(), metric, halving, complete=complete)


def failures(results: dict[str, Any]) -> list[str]:
    """The names of trials that failed."""
    return [one["name"] for one in results["trials"] if one["state"] == "failed"]


def check_metric(grid: Grid, metric: BestMetric) -> None:
    """Raise UserError for a metric that the trials of a sweep do not share."""
    if metric == "loss" and not grid.losses_compare:
        raise UserError(
            f"--metric loss: trials that differ in {', '.join(grid.keys)} minimise different "
            "functions, whose values cannot be compared; take accuracy or margin"
        )
