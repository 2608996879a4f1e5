"""A stage ends early, as a finished one, when its held-out scores no longer improve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

from tandem.recipe.training_settings import EarlyStoppingSettings
from tandem.recipe.unmeant import unmeant
from tandem.stages.training import train_stage as stage_module
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer

from .test_training_stages import run, settings
from .test_validation import WILD, lines, own_data, same, unlike


def early(**values: Any) -> EarlyStoppingSettings:
    return EarlyStoppingSettings(**values)


def wild(folder: Path, **changes: Any) -> dict[str, Any]:
    """Scores after 2, 4, 6 and 8 of 20 steps, of which that after 4 is the best."""
    return WILD | {"keep": "last", "max_steps": 20, "validation": unlike(folder)} | changes


def test_it_ends_after_patience_and_is_finished(tiny_model: Path, tmp_path: Path) -> None:
    """With the metrics of all steps, though their line was not due, and the last weights."""
    whole = wild(tmp_path, save_steps=2, logging_steps=1)
    run("sft", tiny_model, tmp_path / "whole", **whole)
    scores = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "whole")}
    assert min(scores, key=lambda step: (scores[step], step)) == 4
    said = Console(record=True, width=300)
    found = run(
        "sft", tiny_model, tmp_path / "out", console=said,
        **wild(tmp_path, logging_steps=3, early_stopping=early(patience=2)),
    )  # fmt: skip
    at_eight = tmp_path / "whole" / "checkpoints" / "step-000008" / "adapter_model.safetensors"
    assert same(found, load_file(at_eight))
    summary = read_json(tmp_path / "out" / "summary.json")
    reason = (
        "early stopping after step 8 of 20: the held-out loss has not improved 2 times in a row "
        f"since {scores[4]:.4f} at step 4"
    )
    assert summary["early_stopping"] == {"step": 8, "of": 20, "best_step": 4, "reason": reason}
    assert (summary["steps"], summary["kept_step"]) == (8, 8)
    assert said.export_text().count(reason) == 1
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["status"] == "finished"
    assert [line["step"] for line in lines(tmp_path / "out")] == [0, 2, 4, 6, 8]
    logged = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in logged] == [3, 6, 8]
    steps = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert logged[-1]["loss"] == pytest.approx(sum(s["loss"] for s in steps[6:8]) / 2, rel=0.05)
    assert logged[-1]["learning_rate"] == steps[7]["learning_rate"]
    assert logged[-1]["examples"] == sum(s["examples"] for s in steps[6:8])


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({"patience": 1}, 6),
        ({"patience": 3}, 10),
        # Nothing improves on the score after the second step by so much.
        ({"patience": 1, "min_delta": 100.0}, 4),
    ],
)
def test_patience_and_difference(change: Any, ends: int, tiny_model: Path, tmp_path: Path) -> None:
    run("sft", tiny_model, tmp_path / "out", **wild(tmp_path, early_stopping=early(**change)))
    assert read_json(tmp_path / "out" / "summary.json")["steps"] == ends


def test_the_best_may_be_kept_as_well(tiny_model: Path, tmp_path: Path) -> None:
    changes = wild(tmp_path, early_stopping=early(patience=1), keep="best", save_steps=2)
    best = run("sft", tiny_model, tmp_path / "out", **changes)
    at_four = tmp_path / "out" / "checkpoints" / "step-000004" / "adapter_model.safetensors"
    assert same(best, load_file(at_four))
    assert read_json(tmp_path / "out" / "summary.json")["kept_step"] == 4


def test_a_run_that_goes_on_improving_takes_all_steps(tiny_model: Path, tmp_path: Path) -> None:
    held = own_data("dpo", tmp_path / "v.jsonl")
    run(
        "dpo", tiny_model, tmp_path / "out",
        validation=held, early_stopping=early(metric="margin", patience=1),
    )  # fmt: skip
    summary = read_json(tmp_path / "out" / "summary.json")
    assert (summary["steps"], summary["early_stopping"]) == (4, None)
    gains = [line["eval_rewards/margins"] for line in lines(tmp_path / "out")]
    assert gains == sorted(gains)


@pytest.mark.parametrize("crash_after", [3, 5, 7])
def test_an_interrupted_run_ends_where_it_would_have(
    crash_after: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Between a score and its checkpoint as well; the count of scores is not lost or doubled."""
    changes = wild(tmp_path, early_stopping=early(patience=2), save_steps=3)
    whole = run("sft", tiny_model, tmp_path / "whole", **changes)
    plain, taken = trainer.Trainer._take, 0

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > crash_after:
            raise ZeroDivisionError
        return plain(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(ZeroDivisionError):
            run("sft", tiny_model, tmp_path / "out", **changes)
    assert same(run("sft", tiny_model, tmp_path / "out", **changes), whole)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    ended = [read_json(tmp_path / n / "summary.json")["early_stopping"] for n in ("whole", "out")]
    assert ended[0] == ended[1]
    assert ended[0]["step"] == 8


def test_a_run_that_ended_early_takes_no_further_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was killed after its last step, before its adapter was written."""
    changes = wild(tmp_path, early_stopping=early(patience=2))

    def crash(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "_write_result", crash)
        with pytest.raises(ZeroDivisionError):
            run("sft", tiny_model, tmp_path / "out", **changes)
    monkeypatch.setattr(trainer.Trainer, "_take", crash)
    run("sft", tiny_model, tmp_path / "out", **changes)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert (summary["early_stopping"]["step"], summary["steps"]) == (8, 8)


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="early_stopping needs a validation section"):
        settings("sft", tmp_path / "x.jsonl", early_stopping=early())
    with pytest.raises(ValidationError, match="metric margin is of preference pairs; SFT has"):
        settings(
            "sft", tmp_path / "x.jsonl",
            validation={"fraction": 0.1}, early_stopping=early(metric="margin"),
        )  # fmt: skip
    held = {"fraction": 0.1, "steps": 4}
    asked = settings("sft", tmp_path / "x.jsonl", validation=held, early_stopping=early(patience=3))
    assert unmeant(asked, steps=13, records=None) == []
    (said,) = unmeant(asked, steps=12, records=None)
    assert said == (
        "early_stopping.patience 3 is not reached: the run has 3 scores after its steps, and the "
        "first is what others must improve on"
    )
