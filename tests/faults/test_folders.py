"""Output folders that are somebody's: of another kind, in use, not writable."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from tandem.storage.folder_lock import folder_lock

from .desk import Desk, tree


def test_a_folder_with_other_files(desk: Desk) -> None:
    (desk.home / "out").mkdir()
    desk.text("precious", "out/thesis.txt")
    for stage in ("sft", "dpo"):
        desk.refused(desk.train(stage), "out is not empty", "thesis.txt", "another output folder")


def test_a_folder_of_another_stage(desk: Desk) -> None:
    desk.accepted(desk.train())
    out = desk.home / "out"
    desk.refused(desk.train("dpo"), "holds a finished sft stage, and this is dpo")
    desk.refused(desk.merge(desk.model, out, "out"), "finished sft stage, and this is merge")
    desk.refused(desk.merge(desk.model, out, "model"), "model is not empty", "config.json")


def test_a_finished_stage_with_other_settings_is_refused_with_the_difference(desk: Desk) -> None:
    desk.accepted(desk.train())
    desk.refused(desk.train(seed=7), "seed: 42 -> 7", "another output folder", "remove")
    before = tree(desk.home)
    assert "finished with these inputs" in desk.accepted(desk.train())
    assert tree(desk.home) == before


def test_a_file_in_place_of_a_folder(desk: Desk) -> None:
    for output in (desk.pairs, desk.pairs / "deeper"):
        desk.refused(desk.train(output_dir=output), "--output_dir", "is a file, not a folder")
    recipe = desk.recipe(output_dir=str(desk.pairs))
    desk.refused(["run", recipe], "output_dir", "is a file, not a folder")


def test_a_folder_in_use(desk: Desk) -> None:
    (desk.home / "out").mkdir()
    with folder_lock(desk.home / "out"):
        desk.refused(desk.train(), f"in use by another tandem process (pid {os.getpid()})")
    (desk.home / "run" / "1-sft").mkdir(parents=True)
    with folder_lock(desk.home / "run" / "1-sft"):
        desk.refused(["run", desk.recipe()], "1-sft is in use")
    desk.accepted(desk.train())


@pytest.mark.parametrize("name", ["recipe.yaml", "manifest.json", "report.html"])
def test_a_run_writes_over_nobodys_recipe_or_report(desk: Desk, name: str) -> None:
    (desk.home / "project").mkdir()
    desk.text("mine", f"project/{name}")
    recipe = desk.recipe(output_dir=str(desk.home / "project"))
    desk.refused(["run", recipe], f"would overwrite its {name}", "another output_dir")


def test_a_damaged_manifest(desk: Desk) -> None:
    desk.accepted(desk.train())
    desk.text("{", "out/manifest.json")
    desk.refused(desk.train(), "manifest.json cannot be read", "another folder")


def test_a_changed_result_is_not_taken_for_finished(desk: Desk) -> None:
    desk.accepted(desk.train())
    path = desk.home / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    desk.refused(desk.train(), "was changed after the stage finished", "Remove")


def test_a_folder_that_may_not_be_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = desk.home / "locked"
    locked.mkdir()
    plain = Path.mkdir

    # Rights do not bind root, who may run the tests.
    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if locked in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        plain(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    said = (f"{locked / 'out'}: Permission denied", "choose another path")
    desk.refused(desk.train(output_dir=locked / "out"), *said)
    recipe = desk.recipe(output_dir=str(locked / "out"))
    desk.refused(["run", recipe], f"{locked / 'out'}", "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="rights do not bind root")
def test_a_folder_without_the_right_to_write(desk: Desk) -> None:
    locked = desk.home / "locked"
    locked.mkdir(mode=0o500)
    desk.refused(desk.train(output_dir=locked / "out"), "Permission denied", "another path")


def test_a_full_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", str(desk.home / "out" / "x"))

    monkeypatch.setattr("tandem.storage.manifest.atomic_write_json", full)
    desk.refused(desk.train(), "No space left on device", "make room")


def test_an_unfinished_stage_with_nothing_to_lose_takes_the_corrected_recipe(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("tandem.stages.training.trainer_setup.make_optimizer", crash)
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            desk.accepted(desk.train())
    assert (desk.home / "out" / "manifest.json").exists()
    said = desk.accepted(desk.train(learning_rate=1e-3))
    assert "2 steps" in said


def test_a_changed_recipe_of_a_run_is_named_by_its_report(desk: Desk) -> None:
    desk.accepted(["run", desk.recipe(), "--until", "sft"])
    copy = desk.home / "run" / "recipe.yaml"
    page = desk.home / "run" / "report.html"
    assert "recipe.yaml is not as the run left it" not in page.read_text()
    copy.write_text(copy.read_text().replace("seed: 42", "seed: 43"))
    desk.accepted(["report", str(desk.home / "run")])
    assert "recipe.yaml is not as the run left it" in page.read_text()
