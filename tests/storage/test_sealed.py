"""What is read back is checked: keys, types and checksums; files written before have none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import UserError
from tandem.evaluate.scores import MeasurementStore
from tandem.storage.atomic_files import aside_of, atomic_write_json, read_json, remove_left_behind
from tandem.storage.hashing import Damaged, read_object, sealed
from tandem.storage.journal import Journal
from tandem.storage.manifest import check_made, finish_stage, open_stage, start_stage
from tandem.train.checkpoint import read_checkpoint
from tandem.train.held_out_evaluation import forget_after

KINDS = {"a": int, "b": dict}


def test_what_was_sealed_is_read_back_and_old_files_too(tmp_path: Path) -> None:
    value = {"a": 1, "b": {"c": [1.5, "\ud800", (2, 3)]}}
    atomic_write_json(tmp_path / "new.json", sealed(value))
    (tmp_path / "old.json").write_text(json.dumps(value))
    plain = json.loads(json.dumps(value))
    for name in ("new.json", "old.json"):
        assert read_object(tmp_path / name, KINDS, "") == plain


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"[1]", "it holds a list, not an object"),
        (b"null", "it holds null, not an object"),
        (b'{"a": 1}', "it has no key 'b'"),
        (b'{"a": true, "b": {}}', "'a' is true or false, not a whole number"),
        (b'{"a": 1.5, "b": {}}', "'a' is a number, not a whole number"),
        (b'{"a": 1, "b": {}, "checksum": "0"}', "its checksum does not fit"),
        (b"\xff\xfe", "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_another_file_is_named_with_its_key(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Damaged) as error:
        read_object(tmp_path / "x.json", KINDS, "Restore it.")
    assert said in str(error.value)
    assert "x.json cannot be read (" in str(error.value)
    assert str(error.value).endswith(". Restore it.")


def test_every_flipped_bit_of_a_manifest_is_refused(tmp_path: Path) -> None:
    start_stage(tmp_path, "sft", {"seed": 1}, {"threads": 2})
    path = tmp_path / "manifest.json"
    sound = path.read_bytes()
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        said, opened = "manifest.json", None
        try:
            opened = open_stage(tmp_path, "sft", {"seed": 1})
        except UserError as error:
            said = str(error)
        assert "manifest.json" in said
        if opened is not None:  # it was the checksum's own key
            assert opened.schedule == {"threads": 2}
    path.write_bytes(sound)
    assert open_stage(tmp_path, "sft", {"seed": 1}).state == "resume"


@pytest.mark.parametrize("threads", [0, -1, 10**9, "2"])
def test_counts_of_an_old_manifest_that_no_machine_has_are_refused(
    threads: Any, tmp_path: Path
) -> None:
    start_stage(tmp_path, "sft", {}, {"threads": 2})
    path = tmp_path / "manifest.json"
    value = {**read_json(path), "schedule": {"threads": threads}}
    value.pop("checksum")
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"manifest\.json cannot be used: it says threads"):
        open_stage(tmp_path, "sft", {})


def test_weights_that_a_stage_did_not_leave_are_refused_and_other_files_told(
    tmp_path: Path,
) -> None:
    start_stage(tmp_path, "merge", {}, {})
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("sound")
    finish_stage(tmp_path, ["model.safetensors", "config.json"])
    told: list[str] = []
    check_made(tmp_path, told.append)
    assert told == []
    (tmp_path / "config.json").write_text("changed")
    check_made(tmp_path, told.append)
    assert "config.json" in told[0]
    (tmp_path / "model.safetensors").write_text("soumd")
    with pytest.raises(UserError, match=r"model\.safetensors is missing, damaged"):
        check_made(tmp_path, told.append)


def test_a_changed_unit_of_a_journal_is_refused_and_old_journals_go_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "k") as journal:
        journal.add([[0, "an answer"]])
        journal.add([[1, "another"]])
    sound = path.read_text()
    path.write_text(sound.replace("an answer", "an answes"))
    with pytest.raises(UserError, match=r"line 2: damaged\. .* remove the line"):
        Journal(path, "k")
    # A unit of other work does not fit in either.
    with Journal(tmp_path / "other.jsonl", "other") as journal:
        journal.add([[0, "an answer"]])
    strange = (tmp_path / "other.jsonl").read_text().splitlines()[1]
    path.write_text(sound.replace(sound.splitlines()[1], strange))
    with pytest.raises(UserError, match="line 2: damaged"):
        Journal(path, "k")
    path.write_text('{"journal": "k"}\n[[0, "old"]]\n')
    with Journal(path, "k") as journal:
        assert journal.entries == [[[0, "old"]]]
        journal.add([[1, "new"]])
    with Journal(path, "k") as journal:
        assert len(journal.entries) == 2


def test_a_changed_measurement_is_told_and_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    kept = MeasurementStore(tmp_path, told.append)
    kept.keep("own", {"k": 1}, {"score": 0.25})
    assert kept.find("own", {"k": 1}) == {"score": 0.25}
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("0.25", "0.75"))
    assert kept.find("own", {"k": 1}) is None
    assert path.name in told[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder, and a file belongs there"):
        kept.find("own", {"k": 1})


def test_a_checkpoint_of_another_step_or_without_an_optimizer_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "step-000002"
    folder.mkdir()
    for files, step in (({}, 2), ({"optimizer.safetensors": "0", "x": "0"}, 3)):
        (folder / "checkpoint.json").write_text(
            json.dumps({"progress": {"step": step}, "files": files})
        )
        with pytest.raises(Damaged, match="step-000002"):
            read_checkpoint(folder)


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[2]\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n{"ste')
    forget_after(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_half_written_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = aside_of(tmp_path / "x")
    host = own.name.removeprefix(".x.").partition("@")[0]
    (tmp_path / "scores").mkdir()
    gone = [
        tmp_path / f".x.{host}@{dead.pid}.tmp",
        tmp_path / "scores" / f".y.json.{dead.pid}.tmp",
        tmp_path / f".abandoned.elsewhere@{dead.pid}.tmp",
    ]
    stays = [
        tmp_path / f".x.{host}@{os.getppid()}.tmp",
        tmp_path / f".x.elsewhere@{dead.pid}.tmp",
        tmp_path / ".x.tmp",
    ]
    for path in (*gone, *stays):
        path.touch()
    folder = tmp_path / f".saving.{host}@{dead.pid}.tmp"
    (folder / "deep").mkdir(parents=True)
    day = time.time() - 25 * 3600
    os.utime(gone[2], (day, day))
    remove_left_behind(tmp_path)
    assert not any(path.exists() for path in (*gone, folder))
    assert all(path.exists() for path in stays)
