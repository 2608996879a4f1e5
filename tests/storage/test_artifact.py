"""Files are whole or absent, hashes follow content, locks follow the living."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.storage.atomic_files import append_jsonl, atomic_folder, atomic_write_text, read_jsonl
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_bytes, hash_file, hash_files, hash_json
from tandem.storage.manifest import difference, finish_stage, open_stage, start_stage


def test_a_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "step"
    with atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as aside:
        (aside / "a").write_text((aside / "missing").read_text())
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_text_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x", "one")
    atomic_write_text(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2')
    assert read_jsonl(path) == [{"step": 1}]
    assert read_jsonl(tmp_path / "absent") == []


def test_hashes_follow_content_not_names_of_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_bytes(b"1234")
    assert hash_files([tmp_path / "a" / "w"]) == hash_files([tmp_path / "b" / "w"])
    before = hash_file(tmp_path / "a" / "w")
    (tmp_path / "a" / "w").write_bytes(b"12345")
    assert hash_file(tmp_path / "a" / "w") != before
    assert hash_bytes(b"ab", b"c") != hash_bytes(b"a", b"bc")
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})


def test_a_live_holder_blocks_and_a_dead_one_does_not(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\n"
        "from tandem.storage.folder_lock import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"pid {holder.pid}"), folder_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        (tmp_path / "work").touch()
    assert tmp_path.exists()
    with folder_lock(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()


def test_a_stage_folder_is_fresh_then_resumed_then_finished(tmp_path: Path) -> None:
    inputs = {"seed": 1, "settings": {"rate": 0.1, "targets": ("q", "k")}}
    assert open_stage(tmp_path, "sft", inputs).state == "fresh"
    start_stage(tmp_path, "sft", inputs, {"threads": 2})
    resumed = open_stage(tmp_path, "sft", inputs)
    assert (resumed.state, resumed.schedule) == ("resume", {"threads": 2})
    (tmp_path / "out").write_text("x")
    finish_stage(tmp_path, ["out"])
    assert open_stage(tmp_path, "sft", inputs).state == "finished"


def test_other_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    start_stage(tmp_path, "sft", {"seed": 1, "s": {"rate": 0.1}}, {})
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"s\.rate: 0\.1 -> 0\.2"):
        open_stage(tmp_path, "sft", {"seed": 1, "s": {"rate": 0.2}})
    with pytest.raises(UserError, match="a running sft stage, and this is dpo"):
        open_stage(tmp_path, "dpo", {"seed": 1, "s": {"rate": 0.1}})


def test_an_unfinished_stage_without_a_checkpoint_may_get_other_inputs(tmp_path: Path) -> None:
    start_stage(tmp_path, "sft", {"seed": 1}, {"threads": 2})
    (tmp_path / ".saving.123.tmp").mkdir()
    opened = open_stage(tmp_path, "sft", {"seed": 2})
    assert (opened.state, opened.schedule) == ("fresh", {})
    start_stage(tmp_path, "sft", {"seed": 2}, {})
    assert not (tmp_path / ".saving.123.tmp").exists()
    finish_stage(tmp_path, [])
    with pytest.raises(UserError, match="seed: 2 -> 1"):
        open_stage(tmp_path, "sft", {"seed": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "sft"}', '"inputs"'])
def test_a_damaged_manifest_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json (cannot be read|is no manifest)"):
        open_stage(tmp_path, "sft", {})


def test_a_changed_output_and_a_strangers_folder_are_refused(tmp_path: Path) -> None:
    start_stage(tmp_path / "a", "sft", {}, {})
    (tmp_path / "a" / "out").write_text("x")
    finish_stage(tmp_path / "a", ["out"])
    (tmp_path / "a" / "out").write_text("y")
    with pytest.raises(UserError, match="was changed"):
        open_stage(tmp_path / "a", "sft", {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        open_stage(tmp_path / "b", "sft", {})


def test_difference_names_leaves() -> None:
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == [("a.b", 1, 2), ("c", None, 3)]
