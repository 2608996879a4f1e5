"""The trials of a sweep side by side: sweep.json, the page, and the best trial's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.evaluate.scores import difference
from tandem.pipeline.sweep.grid import Grid
from tandem.pipeline.sweep.state import (
    END,
    METRICS,
    Halving,
    Scores,
    TrialState,
    ranked,
)
from tandem.pipeline.sweep.winner import write_best
from tandem.recipe.choices import BestMetric
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.hashing import Damaged, read_object, sealed
from tandem.storage.manifest import read_manifest
from tandem.train.pauses import pause_name

NAME = "sweep.json"


def check_halving(grid: Grid, halving: Halving | None, metric: BestMetric) -> None:
    """Raise UserError where trials have begun that were not compared as is asked now."""
    path = grid.folder / NAME
    if halving is None or not path.exists():
        return
    recorded = read_object(path, {"trials": list}, f"Remove it, or {grid.folder}.").get("halving")
    if recorded == _halving(halving, metric):
        return
    if any(read_manifest(trial.folder) is not None for trial in grid.trials):
        how = "without --halving" if recorded is None else f"with --halving: {recorded}"
        raise UserError(
            f"{grid.folder} has trials that began {how}, so that they cannot be compared on the "
            "way as is asked now. Start the sweep as it began, without --halving, or with another "
            "--name"
        )


def write_results(
    grid: Grid,
    states: Sequence[TrialState],
    metric: BestMetric,
    halving: Halving | None,
    *,
    complete: bool,
) -> dict[str, Any]:
    """Write sweep.json, sweep.html and, once a trial is finished, best.yaml; returns sweep.json.

    `complete` says whether no trial is left to run. The best trial is that of the finished ones.
    Every other is compared with it on the same records, a stopped one with what the best scored
    where it was stopped.
    """
    from tandem.report.sweep_page import write_page

    finished = [state for state in states if state.finished]
    best = ranked(finished, metric, END)[0] if finished else None
    facts = {
        "name": grid.name,
        "recipe": grid.shared.name,
        "keys": {key: _distinct([one.values[key] for one in grid.trials]) for key in grid.keys},
        "metric": metric,
        "losses_compare": grid.losses_compare,
        "halving": None if halving is None else _halving(halving, metric),
        "trials": [_trial(state, best, halving, complete=complete) for state in states],
        "complete": complete,
        "best": None if best is None else best.trial.name,
        "others": _others(grid),
    }
    atomic_write_json(grid.folder / NAME, sealed(facts))
    if best is not None:
        write_best(grid, best.trial)
    write_page(grid.folder)
    return facts


def _halving(halving: Halving, metric: BestMetric) -> dict[str, Any]:
    return {"keep": halving.keep, "rungs": halving.rungs, "metric": metric}


def _trial(
    state: TrialState, best: TrialState | None, halving: Halving | None, *, complete: bool
) -> dict[str, Any]:
    """One row: its values, where it stands, its scores and their differences from the best."""
    at, scores = _last(state, halving)
    about: dict[str, Any] = {
        "name": state.trial.name,
        "folder": str(state.trial.folder),
        "values": dict(state.trial.values),
        "beta": state.trial.recipe.dpo.beta if state.trial.recipe.dpo else None,
        "state": _standing(state, at, complete=complete),
        "reason": state.failure,
        "compared_at": at,
        "rung": _rung(at, halving),
    }
    if scores is None:
        return about
    against = None if best is None or best is state else best.scores(at)
    about |= {key: scores.values[key] for key in ("step", "of", "seconds", "scored_step")}
    about["records"] = scores.count
    about["scores"] = {}
    for metric in METRICS:
        score = scores.of(metric)
        gap = None if against is None else difference(score, against.of(metric))
        about["scores"][metric] = {
            "value": score.value,
            "error": score.error,
            "difference": None if gap is None else list(gap),
        }
    if state.finished:
        summary = _summary(state.trial.folder)
        about["reference_computed"] = summary.get("reference_computed")
        about["reference_seconds"] = summary.get("reference_seconds")
    return about


def _standing(state: TrialState, at: str, *, complete: bool) -> str:
    if state.finished:
        return "finished"
    if state.failure:
        return "failed"
    if at:
        return "stopped" if complete else "paused"
    return "waiting" if state.inputs_hash is None else "running"


def _last(state: TrialState, halving: Halving | None) -> tuple[str, Scores | None]:
    """Where it was scored last, and what it scored there."""
    places = [END] if state.finished else []
    if halving is not None and not state.finished:
        places += [pause_name(share) for share in reversed(halving.shares)]
    for at in places:
        if (scores := state.scores(at)) is not None:
            return at, scores
    return "", None


def _rung(at: str, halving: Halving | None) -> int | None:
    """The number, from 1, of the comparison where a trial was scored last."""
    names = [] if halving is None else [pause_name(share) for share in halving.shares]
    return 1 + names.index(at) if at in names else None


def _summary(folder: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError):
        found = read_json(folder / "summary.json")
        if isinstance(found, dict):
            return found
    return {}


def _distinct(values: Sequence[Any]) -> list[Any]:
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
    return seen


def _others(grid: Grid) -> list[str]:
    """Trials of other values in the same folder, which this sweep does not compare."""
    trials = grid.folder / "trials"
    here = {trial.folder.name for trial in grid.trials}
    found = trials.iterdir() if trials.is_dir() else ()
    others = []
    for path in sorted(found):
        with suppress(Damaged):
            if path.name not in here and path.is_dir() and read_manifest(path) is not None:
                others.append(path.name)
    return others
