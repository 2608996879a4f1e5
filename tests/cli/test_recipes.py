"""`tandem recipes`: a table of what ships, and a copy that is one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.main import main
from tandem.recipe.load_recipe import load_recipe, recipe_names
from tandem.recipe.shipped import shipped_recipes


def test_every_recipe_is_listed_with_model_and_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert [name for name in recipe_names() if name in said] == recipe_names()
    assert "Qwen/Qwen3-8B-Base, one GPU with 24 GB" in said
    assert all(one.hardware and one.head["command"] for one in shipped_recipes())


def test_a_copy_loads_and_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "qwen3-4b-8gpu"]) == 0
    said = capsys.readouterr().out
    assert "tandem rehearse qwen3-4b-8gpu.yaml" in said
    assert "output_dir" in said
    copied = tmp_path / "qwen3-4b-8gpu.yaml"
    assert load_recipe(str(copied)) == load_recipe("qwen3-4b-8gpu")
    # The head's command runs the copy, not the one that ships.
    assert "# command:  tandem run qwen3-4b-8gpu.yaml --nproc 8\n" in copied.read_text()
    copied.write_text("mine")
    assert main(["recipes", "copy", "qwen3-4b-8gpu"]) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err
    assert copied.read_text() == "mine"
    assert main(["recipes", "copy", "demo", "mine.yaml"]) == 0
    assert load_recipe("mine.yaml").model == "demo:base"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["copy", "qwen3-4b"], "no recipe of that name ships. Did you mean 'qwen3-4b-8gpu'?"),
        (["copy"], "needs the NAME of a recipe"),
        (["list", "demo"], "takes no name"),
        (["show"], "invalid choice: 'show'"),
    ],
)
def test_what_cannot_be_done_is_said(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", *argv]) == 2
    assert said in capsys.readouterr().err
