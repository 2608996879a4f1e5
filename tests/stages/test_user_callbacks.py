"""Functions of the user's own: what they are told, the stop they ask for, and what they break."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.errors import Stopped, UserError
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import ValidationSettings
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import training_job

from .made_inputs import make_conversations
from .test_training_stages import settings

WATCH = """\
from pathlib import Path
import json

events = []


def told(event):
    events.append(event)


def enough(event):
    if event.kind == KIND and event.step >= 3 and not (event.folder / "seen").exists():
        (event.folder / "seen").touch()
        return "stop"


def broken(event):
    if event.kind == KIND and event.step >= STEP and not (event.folder / "mended").exists():
        json.loads("{")  # line 20


def wrong(event):
    return "Stop"
"""


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's own in the working folder, which is imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "watch.py").write_text(f"KIND, STEP = 'step', 3\n{WATCH}")
    sys.modules.pop("watch", None)
    import watch  # type: ignore[import-not-found]

    yield watch
    sys.modules.pop("watch", None)


def train(model: Path, folder: Path, *callbacks: str, **changes: Any) -> Path:
    data = folder.parent / "sft.jsonl"
    if not data.exists():
        make_conversations(data)
    held = ValidationSettings(data=(DataSource(path=str(data)),), steps=2)
    wanted = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "validation": held}
    job = training_job(
        settings("sft", data, **(wanted | changes)), model, folder, callbacks=callbacks
    )
    return run_sft(job, Console(quiet=True), default_callbacks(job.run))


def test_they_are_told_of_steps_scores_checkpoints_and_the_end(
    watch: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder = train(tiny_model, tmp_path / "out", "watch:told", logging_steps=4)
    kinds = [(event.kind, event.step) for event in watch.events]
    assert kinds == [
        ("scores", 0), ("scores", 2), ("checkpoint", 2), ("scores", 4), ("step", 4),
        ("checkpoint", 4), ("scores", 6), ("step", 6), ("checkpoint", 6), ("end", 6),
    ]  # fmt: skip
    by_kind = {kind: [e for e in watch.events if e.kind == kind] for kind, _ in kinds}
    assert [dict(e.metrics) for e in by_kind["step"]] == read_jsonl(folder / "metrics.jsonl")
    assert [dict(e.metrics) for e in by_kind["scores"]] == read_jsonl(folder / "validation.jsonl")
    assert by_kind["end"][0].metrics["steps"] == 6
    assert by_kind["checkpoint"][1].checkpoint == folder / "checkpoints" / "step-000004"
    first = watch.events[0]
    assert (first.stage, first.total, first.folder, first.checkpoint) == ("sft", 6, folder, None)
    with pytest.raises(TypeError):
        first.metrics["loss"] = 0.0


@pytest.mark.parametrize(("kind", "step"), [("step", 3), ("scores", 4), ("checkpoint", 4)])
def test_a_stop_that_one_asks_for_is_resumed(
    kind: str, step: int, watch: Any, tiny_model: Path, tmp_path: Path
) -> None:
    watch.KIND = kind
    reason = f"after step {step} of 6: callback watch:enough asked for it; a checkpoint is written"
    with pytest.raises(Stopped, match=reason) as stopped:
        train(tiny_model, tmp_path / "out", "watch:told", "watch:enough")
    assert stopped.value.exit_code == 3
    names = [path.name for path in sorted((tmp_path / "out" / "checkpoints").iterdir())]
    assert names[-1] == f"step-{step:06d}"
    # What watches does not tell one stage from another, so it may be left out.
    resumed = train(tiny_model, tmp_path / "out")
    whole = train(tiny_model, tmp_path / "whole", "watch:told")
    found, wanted = (load_file(f / "adapter_model.safetensors") for f in (resumed, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("kind", "step", "written"), [("step", 3, 3), ("checkpoint", 3, 4), ("step", 6, 6)]
)
def test_one_that_raises_ends_the_run_after_a_checkpoint(
    kind: str, step: int, written: int, watch: Any, tiny_model: Path, tmp_path: Path
) -> None:
    watch.KIND, watch.STEP = kind, step
    with pytest.raises(UserError) as failed:
        train(tiny_model, tmp_path / "out", "watch:broken", "watch:told")
    message = str(failed.value)
    assert "callbacks: watch:broken raised JSONDecodeError: Expecting property name" in message
    assert f"({tmp_path / 'watch.py'}, line 20)" in message
    assert f"step {written}. A checkpoint of step {written} of 6 is written" in message
    assert watch.events[-1].step == written  # the others are told as ever
    (tmp_path / "out" / "mended").touch()
    folder = train(tiny_model, tmp_path / "out", "watch:broken")
    assert read_json(folder / "manifest.json")["status"] == "finished"
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_one_that_raises_outside_of_steps(watch: Any, tiny_model: Path, tmp_path: Path) -> None:
    watch.KIND, watch.STEP = "scores", 0
    with pytest.raises(UserError, match="scores at step 0, before the first step"):
        train(tiny_model, tmp_path / "out", "watch:broken")
    watch.KIND = "end"
    with pytest.raises(UserError, match=r"at the end of the stage\. All steps are taken"):
        train(tiny_model, tmp_path / "out", "watch:broken")
    assert read_json(tmp_path / "out" / "manifest.json")["status"] == "running"
    (tmp_path / "out" / "mended").touch()
    assert read_json(train(tiny_model, tmp_path / "out", "watch:broken") / "manifest.json")[
        "outputs"
    ]
    with pytest.raises(UserError, match="returned 'Stop', but may return \"stop\" or nothing"):
        train(tiny_model, tmp_path / "other", "watch:wrong")


def test_one_that_is_not_there_is_told_before_training(
    watch: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_conversations(tmp_path / "sft.jsonl")
    with pytest.raises(UserError, match="callbacks: watch has no tolld; did you mean told"):
        train(tiny_model, tmp_path / "out", "watch:tolld")
    assert not (tmp_path / "out").exists()
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {tiny_model}\noutput_dir: out\nchat_template: neural-chat\n"
        f"sft: {{data: {data}, max_length: 128}}\n"
    )
    assert main(["run", "r.yaml", "callbacks=[nowhere:told]"]) == 2
    assert "callbacks: there is no module nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out" / "1-sft").exists()
