"""A run that is killed, anywhere and often, ends with the parameters of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tandem.errors import UserError
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.storage.folder_lock import check_free

from ..cli.fresh import fresh
from ..faults.desk import tree
from ..stages.made_inputs import make_conversations, make_model_folder
from ..warm.python import python
from .launcher import Done, Launcher

STAGES = {
    "sft": "1-sft",
    "sft-merge": "2-sft-merged",
    "pairs": "3-pairs",
    "dpo": "4-dpo",
    "dpo-merge": "5-final",
    "evaluate": "6-evaluation",
}
STEADY = ("step", "loss", "grad_norm", "learning_rate", "rewards/margins")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, and a recipe with every stage."""
    home = tmp_path_factory.mktemp("home")
    make_model_folder(home / "model")
    make_conversations(home / "conversations.jsonl")
    make_conversations(home / "heldout.jsonl", 6)
    questions = '{"question": "say red", "answer": "red", "completion": "red green"}\n'
    (home / "questions.jsonl").write_text(questions * 2)
    stage = {"batch_size": 4, "max_length": 200, "save_steps": 1, "logging_steps": 1}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    recipe = {
        "name": "interrupted",
        "model": "model",
        "output_dir": "runs/whole",
        "sft": {"data": "conversations.jsonl", "max_steps": 2, "lora": lora, **stage},
        "pairs": {
            "prompts": "conversations.jsonl",
            "heldout": "heldout.jsonl",
            "max_new_tokens": 8,
            "keep": "different",
        },
        "dpo": {"max_steps": 2, "learning_rate": 1e-3, **stage},
        "evaluate": {"questions": "questions.jsonl", "max_new_tokens": 6, "samples": 2},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.fixture(scope="module")
def launcher(home: Path) -> Launcher:
    """Where the commands of this module run."""
    return Launcher(home)


@pytest.fixture(scope="module")
def whole(home: Path, launcher: Launcher) -> Done:
    """The run that nobody interrupts."""
    done = launcher.run("run", "recipe.yaml", root=home / "runs" / "whole", cache="cache-whole")
    assert done.code == 0, done.said
    return done


def same_results(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits, whatever their times and paths."""
    for name in (
        "1-sft/adapter_model.safetensors",
        "2-sft-merged/model.safetensors",
        "3-pairs/pairs.jsonl",
        "3-pairs/heldout.jsonl",
        "4-dpo/adapter_model.safetensors",
        "5-final/model.safetensors",
        "5-final/tokenizer.json",
        "5-final/chat_template.jinja",
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for stage in ("1-sft", "4-dpo"):
        metrics = [
            [{key: line[key] for key in STEADY if key in line} for line in read_jsonl(file)]
            for file in (one / stage / "metrics.jsonl", other / stage / "metrics.jsonl")
        ]
        assert metrics[0] == metrics[1]
        assert [line["step"] for line in metrics[1]] == [1, 2]
    answers = [read_json(folder / "6-evaluation" / "evaluation.json") for folder in (one, other)]
    for answer in answers:
        for model in answer["models"].values():
            model.pop("path")
    assert answers[0] == answers[1]


def finished(folder: Path) -> bool:
    """Whether a stage's folder says that it is finished."""
    path = folder / "manifest.json"
    return path.exists() and read_json(path)["status"] == "finished"


def released(folder: Path) -> bool:
    """Whether no live process holds a folder."""
    try:
        check_free(folder)
    except UserError:
        return False
    return True


def leftovers(run: Path) -> list[str]:
    """Files of killed processes that lie in a stage's folder."""
    return [p for p in tree(run) if "/" in p and (p.endswith((".tmp", ".lock", "saving")))]


@pytest.mark.usefixtures("whole")
def test_killed_again_and_again_in_every_stage_it_ends_with_the_same_bits(
    home: Path, launcher: Launcher
) -> None:
    run = home / "runs" / "killed"
    command = ("run", "recipe.yaml", "output_dir=runs/killed")
    kills = {}
    for name, folder in STAGES.items():
        # Each time a little further into the stage, until it gets to its end. What the second
        # training and the second merge do to files is what the first ones did.
        for kill_at in range(1, 1000, 45 if name.startswith("dpo") else 19):
            done = launcher.run(
                *command, "--until", name, root=run / folder, cache="cache", kill_at=kill_at
            )
            if not done.killed:
                break
            kills[name] = kill_at
        assert done.code == 0, done.said
    assert kills.keys() == STAGES.keys()
    assert kills["sft"] > 40
    done = launcher.run(*command, root=run, cache="cache")
    assert done.code == 0, done.said
    assert done.said.count("finished with these inputs") >= 5
    same_results(home / "runs" / "whole", run)
    assert leftovers(run) == []


@pytest.mark.usefixtures("whole")
def test_a_finished_run_says_so_without_torch_and_changes_nothing(home: Path) -> None:
    run = home / "runs" / "whole"
    before = tree(run)
    done = fresh("run", "recipe.yaml", home=home)
    assert done.code == 0
    for folder in list(STAGES.values())[:5]:
        assert f"runs/whole/{folder} is finished with these inputs; nothing to do" in done.err
    assert not done.packages & {"torch", "transformers", "peft", "datasets", "pandas", "accelerate"}
    after = tree(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert after.keys() == before.keys()
    assert changed <= {"report.html"}


def test_the_installed_command_is_killed_from_outside(home: Path, launcher: Launcher) -> None:
    run = home / "runs" / "outside"
    command = ("run", "recipe.yaml", "output_dir=runs/outside", "sft.max_steps=8")
    with (home / "outside.txt").open("w") as output:
        process = subprocess.Popen(
            [python(), Path(sys.executable).with_name("tandem"), *command],
            cwd=home,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home / "cache-out")},
        )
        deadline = time.monotonic() + 120
        while not list(run.glob("1-sft/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
    while not released(run / "1-sft"):  # the fork dies just after
        time.sleep(0.005)
    assert not finished(run / "1-sft")
    said = launcher.run(*command, "--until", "sft", root=run, cache="cache-out").said
    assert "resuming from" in said
    changed = launcher.run(*command[:3], "sft.max_steps=7", root=run, cache="cache-out")
    assert changed.code == 2
    assert "settings.max_steps: 8 -> 7" in changed.said
