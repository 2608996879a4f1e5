"""Where each trial of a sweep stands, as its files say; nothing is remembered elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.evaluate.scores import MeasurementStore, Score
from tandem.pipeline.sweep.grid import Grid, Trial
from tandem.recipe.choices import BEST_METRICS, BestMetric
from tandem.stages.finished import settings_that_count
from tandem.storage.manifest import difference, read_manifest

END, FAILED = "end", "failed"
METRICS = tuple(sorted(BEST_METRICS, key=lambda name: name == "loss"))  # the loss is last


@dataclass(frozen=True)
class Halving:
    """How trials are stopped that are behind."""

    keep: float  # share of the trials that goes on
    rungs: int  # how often they are compared before the end

    @property
    def shares(self) -> list[float]:
        """The shares of all steps after which trials are compared, in order."""
        return [self.keep ** (self.rungs - number) for number in range(self.rungs)]

    def survivors(self, count: int) -> int:
        """How many of some trials go on."""
        return max(1, math.ceil(self.keep * count - 1e-9))


@dataclass(frozen=True)
class Scores:
    """A trial's scores of the held-out records, at its end or where it paused."""

    values: Mapping[str, Any]

    def of(self, metric: BestMetric) -> Score:
        """A metric, record by record; a record counts by its pairs."""
        names = {"accuracy": "right", "margin": "margins", "loss": "losses"}
        weights = self.values["loss_weights" if metric == "loss" else "pairs"]
        # Records of other content are not the same items.
        items = tuple(f"{self.values['records'][:16]}:{i}" for i in range(len(weights)))
        return Score(items, tuple(self.values[names[metric]]), tuple(weights))

    @property
    def count(self) -> int:
        """How many held-out records there are."""
        return len(self.values["pairs"])


@dataclass(frozen=True)
class TrialState:
    """What a trial's files say."""

    trial: Trial
    inputs_hash: str | None  # of its stage's manifest; None: it has not begun
    started_at: str  # of the same manifest
    finished: bool
    store: MeasurementStore

    def scores(self, at: str) -> Scores | None:
        """Its scores at its end, or after a share of its steps; None where there are none."""
        if self.inputs_hash is None:
            return None
        found = self.store.find(self.trial.name, {"inputs": self.inputs_hash, "at": at})
        return None if found is None else Scores(found)

    @property
    def failure(self) -> str:
        """Why it cannot go on; empty if it can, and if its folder was made anew since."""
        found = self.store.find(self.trial.name, self._failed)
        return "" if found is None else str(found["reason"])

    def fail(self, reason: str) -> None:
        """Keep the reason why it cannot go on."""
        self.store.keep(self.trial.name, self._failed, {"reason": reason})

    @property
    def _failed(self) -> dict[str, Any]:
        return {"inputs": self.inputs_hash, "at": FAILED, "started": self.started_at}


def store_of(folder: Path, log: Callable[[str], None] = lambda _: None) -> MeasurementStore:
    """Where a sweep keeps the scores of its trials."""
    return MeasurementStore(folder / "scores", log)


def state_of(trial: Trial, store: MeasurementStore) -> TrialState:
    """Read where a trial stands.

    Raises UserError for a finished one whose scores are gone.
    """
    manifest = read_manifest(trial.folder)
    if manifest is None:
        return TrialState(trial, None, "", False, store)
    finished = manifest["status"] == "finished"
    begun = manifest["inputs_hash"], manifest["started_at"]
    state = TrialState(trial, *begun, finished, store)
    if finished and state.scores(END) is None:
        raise UserError(
            f"{trial.folder} is finished, but its scores in {store.folder} are missing or damaged; "
            f"remove {trial.folder} to train this trial again"
        )
    return state


def check_begun(grid: Grid) -> None:
    """Raise UserError for a trial that has begun with other settings, or from other inputs.

    The stage would say so as well, but not of a trial that has been stopped.
    """
    first: tuple[Trial, dict[str, Any]] | None = None
    for trial in grid.trials:
        manifest = read_manifest(trial.folder)
        if manifest is None or not _holds_work(trial.folder, manifest):
            continue
        assert trial.recipe.dpo is not None
        there = {key: manifest["inputs"].get(key) for key in ("settings", "seed")}
        settings = settings_that_count(trial.recipe.dpo)
        now = {"settings": json.loads(json.dumps(settings)), "seed": trial.recipe.seed}
        if changes := difference(there, now):
            raise _others(trial, changes, grid)
        inputs = {key: value for key, value in manifest["inputs"].items() if key != "settings"}
        if first is None:
            first = trial, inputs
        elif changes := difference(first[1], inputs):
            raise UserError(
                f"{trial.folder} and {first[0].folder.name} beside it were trained from other "
                f"inputs: {', '.join(key for key, _, _ in changes)}. Remove the older one, or the "
                "sweep's folder"
            )


def _others(trial: Trial, changes: Sequence[tuple[str, Any, Any]], grid: Grid) -> UserError:
    listing = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changes)
    return UserError(
        f"{trial.folder} holds a trial with other settings (there -> now):\n{listing}\nUse the "
        f"same settings, give this sweep another --name than {grid.name}, or remove {trial.folder}"
    )


def _holds_work(folder: Path, manifest: Mapping[str, Any]) -> bool:
    return manifest["status"] == "finished" or any(folder.glob("checkpoints/step-*"))


def ranked(states: Sequence[TrialState], metric: BestMetric, at: str) -> list[TrialState]:
    """The trials in order, the best first; equal ones by their margin, then as they were listed.

    One that had ended before is compared by its end.
    """

    def key(state: TrialState) -> tuple[float, float]:
        scores = state.scores(at) or state.scores(END)
        assert scores is not None, "it has come there"
        value = scores.of(metric).value
        return (value if metric == "loss" else -value, -scores.of("margin").value)

    return sorted(states, key=key)
