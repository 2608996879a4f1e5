"""`tandem run`, `chat`, `report` and `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tandem.pipeline.run_pipeline
import tandem.report.html
import tandem.report.run_facts
import tandem.storage.cache_folder
from tandem import __version__
from tandem.cli.main import main
from tandem.errors import Stopped
from tandem.model.generate import Sampling
from tandem.recipe.load_recipe import load_recipe
from tandem.recipe.recipe import Recipe


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """The pipeline and the report replaced by ones that remember what they were asked."""
    made: list[tuple[Recipe, dict[str, Any]]] = []

    def run_pipeline(recipe: Recipe, **options: Any) -> None:
        made.append((recipe, options))

    monkeypatch.setattr(tandem.pipeline.run_pipeline, "run_pipeline", run_pipeline)
    monkeypatch.setattr(tandem.report.html, "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(tandem.report.run_facts, "warnings_of_run", lambda folder: [])
    return made


def test_a_dry_run_prints_a_recipe_that_can_be_run(
    runs: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", "neural-chat-7b-v3-1", "sft.batch_size=32", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(shown)
    assert load_recipe(str(path)) == load_recipe("neural-chat-7b-v3-1", ["sft.batch_size=32"])
    for folder in ("1-sft", "2-sft-merged", "4-dpo", "5-final"):
        assert f"runs/neural-chat-7b-v3-1/{folder}" in shown
    assert "3-pairs" not in shown
    assert not runs
    assert not list(tmp_path.glob("runs*"))


def test_a_dry_run_shows_which_stages_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--dry-run", "--from", "pairs", "--until=dpo"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#   ")]
    left_out = [line.split()[1] for line in lines if line.endswith("not asked for")]
    assert left_out == ["sft", "sft-merge", "dpo-merge", "evaluate"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--until", "dqo"], "--until dqo: this recipe's stages are sft, sft-merge"),
        (["--from", "dpo", "--until", "sft"], "--from dpo comes after --until sft"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: list[str],
    said: str,
    more: list[str],
) -> None:
    assert main(["run", "demo", f"output_dir={tmp_path}/x", *flags, *more]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "demo", "seed=3", "output_dir=there", "--until", "dpo", "--from", "sft"],
        ["run", "--until=dpo", "demo", "seed=3", "--from=sft", "output_dir=there"],
    ],
)
def test_run_passes_on_what_it_was_asked_in_any_order(
    runs: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert main(argv) == 0
    ((recipe, options),) = runs
    assert recipe == load_recipe("demo", ["seed=3", "output_dir=there"])
    assert (options["until"], options["start"]) == ("dpo", "sft")
    assert capsys.readouterr().out == "report: there/report.html\n"


def test_a_run_that_is_stopped_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_pipeline(recipe: Recipe, **options: Any) -> None:
        raise Stopped("after step 5; the same command goes on")

    monkeypatch.setattr(tandem.pipeline.run_pipeline, "run_pipeline", run_pipeline)
    assert main(["run", "demo"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"tandem {__version__}: demo -> runs/demo, 6 stages",
        "stopped: after step 5; the same command goes on",
    ]


def test_a_wrong_recipe_runs_nothing(runs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "sft.lerning_rate=1"]) == 2
    assert "did you mean sft.learning_rate?" in capsys.readouterr().err
    assert not runs


def test_chat_passes_on_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    session = pytest.importorskip("tandem.chat.session")
    made: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        session, "run_chat", lambda models, options, _: made.append((models, options))
    )
    argv = [
        "chat",
        "a",
        "--device",
        "cpu",
        "--max-new-tokens",
        "9",
        "b",
        "--chat_template=t",
        "--system",
        "Be brief.",
    ]
    assert main(argv) == 0
    ((models, options),) = made
    assert list(models) == ["a", "b"]
    assert options == session.ChatOptions(
        Sampling(9, 0.7, 0.95), system="Be brief.", chat_template="t", seed=None, device="cpu"
    )


def test_report_prints_where_the_page_is(
    runs: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


def test_cache_shows_and_empties(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == "   0 bytes  in all\n"
    monkeypatch.setattr(
        tandem.storage.cache_folder, "cache_report", lambda: [("a", 1536), ("b", 512)]
    )
    monkeypatch.setattr(tandem.storage.cache_folder, "clear_cache", lambda: 3 * 2**20)
    assert main(["cache", "show"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == "1.5 KiB a 512 bytes b 2.0 KiB in all"
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "freed 3.0 MiB\n"


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_place_of_the_output_folder_is_refused(
    runs: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    commands = [
        (["run", "demo", f"output_dir={file}{below}"], "output_dir"),
        (
            ["sft", "--model_name_or_path=m", "--dataset_name=d", f"--output_dir={file}{below}"],
            "--output_dir",
        ),
        (
            ["merge", "--base-model-path=b", "--lora-model-path=l", f"--output-path={file}{below}"],
            "--output-path",
        ),
    ]
    for argv, name in commands:
        assert main(argv) == 2
        said = f"error: {name}: {file} is a file, not a folder; name another folder\n"
        assert capsys.readouterr().err.endswith(said)
    assert file.read_text() == "mine"
    assert not runs
