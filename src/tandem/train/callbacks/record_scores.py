"""What training did to each held-out record, kept where a run pauses and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.example import Example
from tandem.errors import NotFinite, Stopped, UserError
from tandem.recipe.dpo_settings import DpoSettings
from tandem.storage.hashing import hash_bytes, hash_json
from tandem.storage.manifest import read_manifest
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.train.callbacks.held_out_evaluation import HeldOutEvaluation
from tandem.train.pauses import pause_name, pause_steps
from tandem.train.reference_logps import reference_logps
from tandem.train.step import StepRunner

END = "end"
"""Where scores were taken, for those of a finished run."""


class Kept(Protocol):
    """Where scores stay on disk, by name and key."""

    def find(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept under a key, None for nothing."""
        ...

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result; a reader sees all of it or nothing."""
        ...


def scores_key(inputs_hash: str, at: str) -> dict[str, str]:
    """The key of a run's scores: its manifest's hash of inputs, and where they were taken."""
    return {"inputs": inputs_hash, "at": at}


@dataclass
class RecordScores(Callback):
    """Scores every held-out record of a DPO run at its end, or where it pauses.

    A record's margin is what its chosen answer's log-prob gained since before the first step, less
    what its rejected answer's did, in nats, whatever beta and loss are; of a single answer it is
    its gain, or its loss if the answer is a bad one. A row of several answers has a margin for each
    pair of them. The scores are those of the adapter that would be kept here.
    """

    kept: Kept
    name: str  # the run's, for its files
    shares: Sequence[float]  # of all steps, after which runs of this kind pause
    pause_at: float | None  # the one of them after which this run pauses; None: it goes to its end
    paused: bool = False  # whether the run has come there

    def on_set_up(self, run: TrainingRun, model: Any) -> None:  # noqa: ARG002
        """Refuse a run that is too short before it takes a step."""
        pause_steps(self.shares, run.total_steps)

    def on_train_begin(self, run: TrainingRun) -> None:
        """Score the untrained policy; make up for scores that were lost."""
        self._start(run)
        at, due, step = self._at(run), self._due(run), run.state.step
        if step < due and not run.finish_reason:
            return
        if run.on_rank0(lambda: self.kept.find(self.name, _key(run, at))) is not None:
            return
        if step > due and not run.finish_reason:
            raise UserError(
                f"the scores of {run.folder} at step {due} are missing or damaged, and it is at "
                f"step {step}; remove {run.folder} to train this trial again"
            )
        self._keep(run, at)
        if self.pause_at is not None and not run.finish_reason:
            self.paused = True
            run.engine.processes.raise_on_all(Stopped(f"paused after step {step}"))

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:  # noqa: ARG002
        """Keep what the best adapter so far scores, where that is to be the result."""
        if run.job.settings.keep == "best" and run.state.best_step == run.state.step:
            self._write(run, f"step {run.state.step}", self._scores(run))

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Score where the run ends or pauses: before the checkpoint, which must not be ahead."""
        if report.last or run.finish_reason:
            self._keep(run, END)
        elif self.pause_at is not None and run.state.step == self._due(run):
            self._keep(run, self._at(run))
            self.paused = True
            run.ask_to_stop("the trials are compared here")

    def _at(self, run: TrainingRun) -> str:
        ends = self.pause_at is None or bool(run.finish_reason)
        return END if ends or self.pause_at is None else pause_name(self.pause_at)

    def _due(self, run: TrainingRun) -> int:
        if self.pause_at is None:
            return run.total_steps
        steps = pause_steps(self.shares, run.total_steps)
        return steps[list(self.shares).index(self.pause_at)]

    def _keep(self, run: TrainingRun, at: str) -> None:
        """Keep the scores of the adapter that would be the result."""
        best = run.state.best_step
        if run.job.settings.keep == "best" and best is not None and best != run.state.step:
            found = run.on_rank0(lambda: self.kept.find(self.name, _key(run, f"step {best}")))
            if found is None:
                raise UserError(
                    f"the scores of {run.folder} at step {best} are missing or damaged; remove "
                    f"{run.folder} to train this trial again"
                )
            self._write(run, at, {**found, **_progress(run)})
        else:
            self._write(run, at, self._scores(run))

    def _write(self, run: TrainingRun, at: str, scores: dict[str, Any]) -> None:
        run.on_rank0(lambda: self.kept.keep(self.name, _key(run, at), scores))

    def _start(self, run: TrainingRun) -> list[float]:
        """The log-probs of all held-out sequences before the first step; runs share them."""
        records, key = _held_out(run), _start_key(run)
        found = run.on_rank0(lambda: self.kept.find("start", key))
        if found is not None:
            return list(found["logps"])
        if run.state.step > 0:
            raise UserError(
                f"the log-probs before the first step of {run.folder} are missing or damaged; "
                f"remove {run.folder} to train this trial again"
            )
        logps = _logps(run, records).tolist()
        run.on_rank0(lambda: self.kept.keep("start", key, {"logps": logps}))
        return logps

    def _scores(self, run: TrainingRun) -> dict[str, Any]:
        """Of each record: its pairs, the sum of their margins, how many are right, its loss."""
        records, settings = _held_out(run), run.job.settings
        assert isinstance(settings, DpoSettings)
        start = np.array(self._start(run))
        logps = _logps(run, records)
        losses = _losses(run, records, logps)
        if not (np.isfinite(logps).all() and np.isfinite(losses).all()):
            raise NotFinite(
                f"a held-out record's log-prob or loss is not finite after {run.state.step} steps. "
                "Lower the learning rate, or look at the records."
            )
        pairs, margins, right = _compared(records, logps - start, settings)
        return {
            "records": _hash_of(records),
            "pairs": pairs,
            "margins": margins,
            "right": right,
            "losses": losses,
            # a loss of pairs is divided by them, any other by the records
            "loss_weights": pairs if settings.compared == "pairs" else [1.0] * len(pairs),
            "scored_step": run.state.step,
            **_progress(run),
        }


def _progress(run: TrainingRun) -> dict[str, Any]:
    state = run.state
    return {
        "step": state.step,
        "of": run.total_steps,
        "seconds": state.seconds + state.validation_seconds,
    }


def _held_out(run: TrainingRun) -> EncodedDataset:
    assert run.held_out is not None, "the recipe has been checked for dpo.validation"
    return run.held_out


def _inputs(run: TrainingRun) -> dict[str, Any]:
    manifest = read_manifest(run.folder)
    assert manifest is not None, "a stage that trains has one"
    return dict(manifest["inputs"])


def _key(run: TrainingRun, at: str) -> dict[str, str]:
    return scores_key(hash_json(_inputs(run)), at)


def _start_key(run: TrainingRun) -> dict[str, Any]:
    device = run.engine.device
    return {
        "model": hash_json(run.on_rank0(lambda: _inputs(run)["model"])),
        "records": _hash_of(_held_out(run)),
        "dtype": device.dtype_name,
        "device": device.kind,
        "attention": run.execution["attention"],
    }


def _hash_of(records: EncodedDataset) -> str:
    return hash_bytes(records.branches.tobytes(), records.scores.tobytes(), *records.all_digests())


def _evaluation(run: TrainingRun) -> StepRunner:
    """What scores the held-out records on the way."""
    return next(one.runner for one in run.callbacks if isinstance(one, HeldOutEvaluation))


def _logps(run: TrainingRun, examples: Sequence[Example]) -> NDArray[np.float64]:
    """The log-probs of all sequences [S] under the result as it would be now."""
    model = run.engine.model
    model.eval()
    with run.engine.result_in_place():
        logps, _ = reference_logps(
            run.engine, examples, store=None, identity="", budget=_evaluation(run).budget,
            advance=lambda _: None,
        )  # fmt: skip
    model.train()
    return logps


def _losses(run: TrainingRun, records: EncodedDataset, logps: NDArray[np.float64]) -> list[float]:
    """The loss of each record, the held-out records being one step."""
    runner = _evaluation(run)
    objective, examples = runner.objective, runner.examples
    if examples is not records:  # tokens have weights
        logps = _logps(run, examples)
    everything = range(len(examples))
    objective.begin([examples[i] for i in everything], everything)
    if objective.couples:
        seen = logps if runner.observed is None else _logps(run, runner.observed)
        objective.see_step(torch.from_numpy(seen))
    losses, first = [], 0
    for i, count in enumerate(records.branches.tolist()):
        own = torch.from_numpy(logps[first : first + count])
        value = objective.loss(own, torch.ones_like(own), (i,), first_step=False)
        losses.append(float(value.sums["loss"]))
        first += count
    return losses


def _compared(
    records: EncodedDataset, gains: NDArray[np.float64], settings: DpoSettings
) -> tuple[list[float], list[float], list[float]]:
    """Of each record: its number of pairs, the sum of their margins, and how many are right."""
    pairs, margins, right, first = [], [], [], 0
    for count in records.branches.tolist():
        own = slice(first, first + count)
        gained, scores = gains[own], records.scores[own]
        if settings.compared == "answers":
            differences = np.where(scores > 0.5, gained, -gained)
        else:
            if np.isnan(scores).any():  # plain pairs, the better one first
                scores = np.arange(count, 0, -1.0)
            better, worse = np.nonzero(scores[:, None] > scores[None, :])
            differences = gained[better] - gained[worse]
        pairs.append(float(len(differences)))
        margins.append(float(differences.sum()))
        right.append(float((differences > 0).sum()))
        first += count
    return pairs, margins, right
