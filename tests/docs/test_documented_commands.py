"""Every command that the documents show is understood, and the tutorial runs as it stands."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tandem.chat.session
import tandem.evaluate.evaluate_models
import tandem.export.export_gguf
import tandem.export.ollama
import tandem.model.base_model
import tandem.pairs.make_pairs
import tandem.pipeline.rehearsal.rehearse
import tandem.pipeline.run_pipeline
import tandem.pipeline.sweep.run_sweep
import tandem.plan.rate
import tandem.report.html
import tandem.report.run_facts
import tandem.runtime.local_launcher
import tandem.stages.dpo
import tandem.stages.finished
import tandem.stages.merge
import tandem.stages.sft
from tandem.cli.main import main
from tandem.pipeline.rehearsal.findings import Rehearsal
from tandem.storage.atomic_files import read_json, read_jsonl

from ..check.made_data import conversation, write
from .pages import (
    LAUNCHERS,
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    launches,
    page_name,
    tandem_commands,
)

TUTORIAL = ROOT / "docs" / "guide" / "tutorial.md"
# Model and data that a command of the documents may name although nothing of it is here.
_RECIPE_OF_THE_READER = "my-recipe.yaml"
_DATA_OF_THE_READER = "my-data.jsonl"
_EMPTY_SWEEP = {"name": "s", "keys": {}, "metric": "accuracy", "trials": [], "best": None,
                "complete": True}  # fmt: skip


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty folder to run in, and stages that only note that they were called."""
    called: list[str] = []
    for module, name, result in (
        (tandem.stages.sft, "run_sft", None),
        (tandem.stages.dpo, "run_dpo", None),
        (tandem.stages.merge, "run_merge", None),
        (tandem.pairs.make_pairs, "make_pairs", None),
        (tandem.pipeline.run_pipeline, "run_pipeline", None),
        (tandem.pipeline.sweep.run_sweep, "run_sweep", _EMPTY_SWEEP),
        (tandem.evaluate.evaluate_models, "evaluate_models", {"models": {}, "samples": []}),
        (tandem.chat.session, "run_chat", None),
        (tandem.report.html, "write_report", Path("report.html")),
        (tandem.report.run_facts, "warnings_of_run", []),
        (tandem.runtime.local_launcher, "run_processes", 0),
        (tandem.pipeline.rehearsal.rehearse, "rehearse", Rehearsal((), (), (), (), (), 0.0, None)),
        (tandem.export.export_gguf, "export_gguf", Path("model.gguf")),
        (tandem.export.export_gguf, "check_gguf", SimpleNamespace(lines=list)),
        (tandem.export.ollama, "export_ollama", Path("model-ollama")),
    ):

        def stage(*_: Any, _name: str = name, _result: Any = result, **__: Any) -> Any:
            called.append(_name)
            return _result

        monkeypatch.setattr(module, name, stage)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    # What is named is not there.
    for module, name in (
        (tandem.pipeline.run_pipeline, "training_is_finished"),
        (tandem.stages.finished, "merge_is_finished"),
        (tandem.model.base_model, "check_model"),
        (tandem.runtime.local_launcher, "check_devices"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    # A plan measures this processor for a third of a second.
    monkeypatch.setattr(tandem.plan.rate, "timed_product", lambda *_: 1e10)
    monkeypatch.chdir(tmp_path)
    return called


@pytest.fixture(scope="module")
def files_of_the_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once for all commands, which have copies."""
    folder = tmp_path_factory.mktemp("files")
    _write_files(folder)
    return folder


def _write_files(folder: Path) -> None:
    """Put the files that the pages show, and stand-ins for those they only name, in place."""
    shipped = ROOT / "src" / "tandem" / "recipes" / "demo.yaml"
    (folder / _RECIPE_OF_THE_READER).write_text(shipped.read_text())
    rows = [conversation(seed) for seed in range(8)]
    write(folder / _DATA_OF_THE_READER, rows)
    write(folder / "my-questions.jsonl", [{"question": "Is this asked?", "answer": "No."}])
    for block in blocks(TUTORIAL, "sh"):
        if block.text.startswith("cat > "):
            subprocess.run(["bash", "-eu", "-c", block.text], cwd=folder, check=True)


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in tandem_commands()}
    shown = {f"docs/guide/{page}.md" for page in ("commands", "recipes", "tutorial")}
    assert {"README.md", *shown} <= pages


@pytest.mark.parametrize(
    ("page", "words"),
    tandem_commands(),
    ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60],
)
def test_a_shown_command_is_understood(
    page: str,
    words: list[str],
    stages: list[str],
    files_of_the_pages: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del page
    shutil.copytree(files_of_the_pages, tmp_path, dirs_exist_ok=True)
    if words[1] == "report":
        (tmp_path / words[2]).mkdir(parents=True)
    if words[1:3] == ["recipes", "copy"]:
        (tmp_path / _RECIPE_OF_THE_READER).unlink()  # it is not there yet
    code = main([word.replace("$BASE", "demo:base") for word in words[1:]])
    assert code == 0, capsys.readouterr().err
    if "--nproc" in words and words[1] != "plan":
        assert stages == ["run_processes"]
        return
    if words[1] in ("check", "show"):
        assert not stages
        return
    works = "--dry-run" not in words and words[1] not in ("cache", "plan", "recipes")
    # A run has a page and findings besides.
    assert len(stages) == works + 2 * (words[1] == "run" and works)


@pytest.mark.parametrize("words", launches(), ids=lambda words: " ".join(words)[:70])
def test_a_launcher_understands_how_it_is_shown(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher.runner import parse_args as deepspeed_arguments
    from torch.distributed.run import parse_args as torchrun_arguments

    if words[0] == "torchrun":
        shown, count = torchrun_arguments(words[1:]), "nproc_per_node"
        script = shown.training_script
    elif words[0] == "deepspeed":
        shown, count = deepspeed_arguments(words[1:]), ""
        script = shown.user_script
        assert shown.include.startswith("localhost:0,1") or shown.hostfile == "hostfile"
    else:
        assert words[1] == "launch"
        shown, count = launch_command_parser().parse_args(words[2:]), "num_processes"
        script = shown.training_script
        assert shown.multi_gpu
    assert (shown.module, script) == (True, "tandem")
    assert not count or int(getattr(shown, count)) > 1


def test_every_launcher_is_shown() -> None:
    assert {words[0] for words in launches()} == set(LAUNCHERS)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_shown_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = [words[1:] for block in blocks(page, "sh") for words in commands(block)
             if words[0] == "make"]  # fmt: skip
    for targets in shown:
        assert all(f"\n{target}:" in makefile for target in targets)


def _add_real_records(folder: Path, shared_data: Path) -> None:
    """Short real conversations and pairs behind the tutorial's own."""
    for name, source, texts in (
        (
            "conversations.jsonl",
            shared_data / "conversations" / "slimorca_format.jsonl",
            lambda row: [turn["value"] for turn in row["conversations"]],
        ),
        (
            "pairs.jsonl",
            shared_data / "pairs" / "mixed_pairs.jsonl",
            lambda row: list(row.values()),
        ),
    ):
        # One file has one layout, so real conversations are put into the tutorial's.
        with source.open() as lines, (folder / name).open("a") as file:
            rows = (json.loads(line) for line in lines)
            short = (row for row in rows if sum(map(len, texts(row))) < 250)
            for row, _ in zip(short, range(4), strict=False):
                file.write(json.dumps(_as_messages(row)) + "\n")


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    if "conversations" not in row:
        return row
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return {
        "messages": [
            {"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
        ]
    }


def _steps(page: Path) -> Iterator[Block]:
    """The shell blocks to run; what installs, and what chooses a base, is left out."""
    for block in blocks(page, "sh"):
        if not block.text.startswith(("make ", "BASE=")):
            yield block


def test_the_tutorial_runs(
    tmp_path: Path,
    stories_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a real pretrained model as the base, and real records added to the tutorial's own.

    Ten steps are the tutorial's; six show the same.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = ""
    for block in _steps(TUTORIAL):
        if block.text.startswith("cat > "):
            text = block.text.replace("max_steps: 10", "max_steps: 6")
            subprocess.run(["bash", "-eu", "-c", text], cwd=tmp_path, check=True)
            if block.text.startswith("cat > questions"):
                _add_real_records(tmp_path, shared_data)
            continue
        for words in commands(block):
            assert words[0] == "tandem", f"nobody runs {words[0]} here"
            monkeypatch.setattr("sys.stdin", io.StringIO("When does the library open?\n/quit\n"))
            words = [word.replace("$BASE", str(stories_path)) for word in words]
            if "--max_steps" in words:
                words[words.index("--max_steps") + 1] = "6"
            code = main(words[1:])
            printed = capsys.readouterr()
            said += printed.out + printed.err
            assert code == 0, f"{' '.join(words)}: {printed.err}"

    for stage in (Path("out/sft"), Path("out/dpo"), Path("runs/library/1-sft")):
        metrics = read_jsonl(tmp_path / stage / "metrics.jsonl")
        assert metrics[-1]["loss"] < metrics[0]["loss"]
    for model in ("out/sft-merged", "out/final", "runs/library/5-final"):
        assert (tmp_path / model / "model.safetensors").stat().st_size > 10**6
    assert (tmp_path / "runs/library/report.html").stat().st_size > 10**4
    evaluation = read_json(tmp_path / "runs/library/6-evaluation/evaluation.json")
    assert evaluation["counts"]["questions"] == 2
    assert read_jsonl(tmp_path / "runs/library-pairs/3-pairs/pairs.jsonl")
    assert not (tmp_path / "runs/library-pairs/4-dpo").exists()
    assert "base + adapter" in said
