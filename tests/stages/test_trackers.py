"""Each tracker's files, read back by its own reader, have what metrics.jsonl has, once."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.integrations import trackers, tracking
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.recipe.data_source import DataSource
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import ValidationSettings
from tandem.stages.finished import training_is_finished
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import training_job

from .made_inputs import make_conversations, make_model_folder
from .stopped import dying_before
from .test_training_stages import settings

ALL = ("tensorboard", "wandb", "mlflow", "trackio")


def train(model: Path, folder: Path, console: Console | None = None, **run: Any) -> Path:
    data = folder.parent / "sft.jsonl"
    if not data.exists():
        make_conversations(data)
    held = ValidationSettings(data=(DataSource(path=str(data)),), steps=3)
    wanted: dict[str, Any] = {"max_steps": 6, "logging_steps": 1, "save_steps": 2}
    job = training_job(settings("sft", data, validation=held, **wanted), model, folder, **run)
    return run_sft(job, console or Console(quiet=True), default_callbacks(job.run))


@dataclass(frozen=True)
class Tracked:
    """A run in all trackers, which died after its fourth step and was resumed."""

    folder: Path
    model: Path
    said: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))  # read when it is imported
        for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def tracked(home: Path) -> Tracked:
    model = make_model_folder(home / "model")
    said = Console(record=True, width=300, file=sys.stderr)
    how: dict[str, Any] = {"trackers": ALL, "name": "facts", "tracker_run": "first"}
    with dying_before(5):  # the last checkpoint is that of the fourth step
        train(model, home / "out", said, **how)
    folder = train(model, home / "out", said, **how)
    return Tracked(folder, model, said.export_text())


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each metric's values by step, as the stage's own files have them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name in ("metrics.jsonl", "validation.jsonl"):
        for line in read_jsonl(folder / name):
            for key, value in line.items():
                if key not in ("step", "epoch"):
                    found.setdefault(key, []).append((line["step"], value))
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["eval_loss"]] == [0, 3, 6]
    return found


def in_tensorboard(tracked: Tracked) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tracked.folder / "trackers" / "tensorboard" / "first-sft"
    read = EventAccumulator(str(place))
    read.Reload()
    tags = read.Tags()["scalars"]
    (written,) = place.glob("*/hparams.yml")
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}, (
        written.read_text()
    )


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of one of wandb's files: LevelDB's log format after a head of seven bytes.

    wandb's own reader is a part of its service, which sends what it reads to a server.
    """
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no room for another head in this block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        chunk = data[place + 7 : place + 7 + length]
        assert zlib.crc32(bytes([kind]) + chunk) == struct.unpack_from("<I", data, place)[0]
        parts, place = parts + chunk, place + 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def in_wandb(tracked: Tracked) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from google.protobuf.json_format import MessageToJson
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    written, runs = "", set()
    for path in sorted((tracked.folder / "trackers" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(path.read_bytes()):
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
                written += MessageToJson(record.run)
            written += MessageToJson(record.config) if record.HasField("config") else ""
            items = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.history.item
            }
            for key, value in items.items():
                if not key.startswith("_"):
                    found.setdefault(key, []).append((int(items["_step"]), float(value)))
    assert [run[1:] for run in runs] == [("facts", "first-sft")]  # one run, in two parts
    return found, written


def in_mlflow(tracked: Tracked) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tracked.folder / "trackers" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("facts")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first-sft", "FINISHED")
    keys = run.data.metrics
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in keys
    }, str(run.data.params)


def in_trackio(tracked: Tracked) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from trackio.api import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("facts")
    assert run.name == "first-sft"
    found: dict[str, list[tuple[int, float]]] = {}
    for line in SQLiteStorage.get_logs("facts", run.name, run_id=run.id):
        for key in line.keys() - {"step", "timestamp"}:
            found.setdefault(key, []).append((line["step"], line[key]))
    return found, str(run.config)


def told(folder: Path) -> list[str]:
    """The summary's warnings of trackers."""
    return [one for one in read_json(folder / "summary.json")["warnings"] if "tracker" in one]


READERS = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


@pytest.mark.parametrize("name", ALL)
def test_its_reader_finds_what_the_stage_has_written(name: str, tracked: Tracked) -> None:
    """Each step once, of a run that died between a logged step and its checkpoint."""
    found, written = READERS[name](tracked)
    rough = 1e-6 if name == "tensorboard" else 0.0  # which keeps float32
    for key, values in expected(tracked.folder).items():
        assert [step for step, _ in found[key]] == [step for step, _ in values], key
        if "second" in key or key == "memory_bytes":
            continue  # of the step as it was taken first
        assert [v for _, v in found[key]] == pytest.approx([v for _, v in values], rel=rough)
    summary = read_json(tracked.folder / "summary.json")
    assert found["summary/examples"] == [(6, summary["examples"])]
    assert "sft.lora.rank" in written
    assert not told(tracked.folder)


def test_the_console_says_once_where_it_is_tracked(tracked: Tracked) -> None:
    for name in ALL:
        assert tracked.said.count(f"tracked by {name}: facts, first-sft") == 1


def test_a_finished_stage_stays_recognised_and_its_numbers_are_the_same(
    tracked: Tracked, tmp_path: Path
) -> None:
    folder = train(tracked.model, tmp_path / "plain")
    found, plain = (load_file(f / "adapter_model.safetensors") for f in (tracked.folder, folder))
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    data = tmp_path / "sft.jsonl"
    held = ValidationSettings(data=(DataSource(path=str(data)),), steps=3)
    asked = settings("sft", data, validation=held, max_steps=6, logging_steps=1, save_steps=2)
    for run in ({}, {"trackers": ("wandb",), "callbacks": ("watch:told",)}):
        job = training_job(asked, tracked.model, folder, **run)
        assert training_is_finished("sft", job, Console(quiet=True))


class Broken:
    """A tracker whose server is gone from the third call on, for so many of them."""

    def __init__(self, calls: int) -> None:
        self.left, self.lines = calls, []  # type: ignore[var-annotated]
        self.settings: list[Any] = []

    def store_init_configuration(self, values: Any) -> None:
        self.settings.append(values)

    def log(self, values: Any, step: int) -> None:
        if len(self.lines) >= 2 and self.left:
            self.left -= 1
            raise ConnectionError("the server\nis gone")
        self.lines.append((step, values))

    def finish(self) -> None:
        raise ConnectionError("still gone")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Broken:
    made = Broken(request.param)
    spec = replace(
        trackers.TRACKERS["trackio"],
        start=lambda _: made,
        id_of=lambda _: "one",
        finish=lambda one: one.finish(),
    )
    monkeypatch.setitem(trackers.TRACKERS, "trackio", spec)
    monkeypatch.setattr(tracking, "_PAUSE", 0.0)
    return made


@pytest.mark.parametrize("broken", [10**6], indirect=True)
def test_one_that_fails_on_the_way_keeps_nothing_from_training(
    broken: Broken, tracked: Tracked, tmp_path: Path
) -> None:
    said = Console(record=True, width=300, file=sys.stderr)
    folder = train(tracked.model, tmp_path / "out", said, trackers=("trackio",))
    assert [step for step, _ in broken.lines] == [0, 1]
    text = said.export_text()
    assert text.count("warning: tracker trackio failed at step 2 (ConnectionError: the server is")
    assert text.count("failed at step") == 1
    lost = (
        "tracker trackio lacks 7 lines, of steps 2 to 6, and has not got the summary "
        "(ConnectionError: the server is gone)"
    )
    assert told(folder) == [lost]
    assert text.count(lost) == 1
    assert "tracker trackio could not be ended (ConnectionError: still gone)" in text
    assert read_json(folder / "manifest.json")["status"] == "finished"


@pytest.mark.parametrize("broken", [3], indirect=True)
def test_one_that_works_again_gets_what_it_lacked(
    broken: Broken, tracked: Tracked, tmp_path: Path
) -> None:
    said = Console(record=True, width=300, file=sys.stderr)
    folder = train(tracked.model, tmp_path / "out", said, trackers=("trackio",))
    assert [step for step, _ in broken.lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 6]
    assert len(broken.settings) == 1
    assert "tracker trackio works again, and has what it lacked" in said.export_text()
    assert not told(folder)


def test_what_cannot_work_is_told_before_training(
    tracked: Tracked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"not logged in to https://api\.wandb\.ai\. Run wandb log"):
        train(tracked.model, tmp_path / "out", trackers=("wandb",))
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {tracked.model}\noutput_dir: run\nchat_template: neural-chat\n"
        "trackers: wandb\nsft: {data: sft.jsonl, max_length: 128}\n"
    )
    assert main(["run", "r.yaml"]) == 2
    assert "error: trackers: wandb is not logged in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "1-sft").exists()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    trackers.check_tracker("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UserError, match=r"not logged in to https://wandb\.example\.org"):
        trackers.check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check_tracker("wandb")
    gone = replace(trackers.TRACKERS["wandb"], package="no-such-package")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", gone)
    with pytest.raises(UserError, match=r"trackers: wandb needs .* pip install '\.\[wandb\]'"):
        train(tracked.model, tmp_path / "out", trackers=("wandb",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UserError, match="trackers: mlflow cannot be started"):
        train(tracked.model, tmp_path / "out", trackers=("mlflow",))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_settings_that_do_nothing_are_refused() -> None:
    for values, said in (
        ({"tracker_run": "a"}, "tracker_run has no effect without trackers"),
        ({"trackers": ("wandb", "wandb")}, "wandb is named twice"),
        ({"trackers": ("tensorbord",)}, "tensorboard"),
    ):
        with pytest.raises(ValueError, match=said):
            RunSettings(model="m", output_dir="o", **values)  # type: ignore[arg-type]
