"""Models and data sets from the Hub, against a stand-in on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_conversations, make_pairs
from .hub import COMMIT, Hub, serving

# Each command line in a fork of a process that asks the stand-in: importing takes longer than all
# of them, and no command may know in memory what another one was told.
COMMANDS = """
import contextlib, io, json, os, sys
import datasets, huggingface_hub.hf_api
import tandem.stages.dpo, tandem.stages.merge, tandem.stages.sft
from tandem.cli.main import main
for line in iter(sys.stdin.readline, ""):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(json.loads(line))
    print(json.dumps([code, said.getvalue()]), flush=True)
    os._exit(0)
"""


class Shell:
    """A process that runs commands with the Hub's address set to the stand-in's."""

    def __init__(self, address: str, home: Path) -> None:
        self.home = home
        unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in unset} | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(home / "hf"),
            "XDG_CACHE_HOME": str(home / "cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )

    def run(self, *argv: str) -> tuple[int, str]:
        """The exit code of a command, and what it said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a tiny model, conversations and pairs, and repositories that it refuses."""
    from ..stages.made_inputs import make_model_folder

    folder = tmp_path_factory.mktemp("hub")
    model = make_model_folder(folder / "model")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    # What a page may hold besides: weights in other layouts, which are not fetched.
    files |= {"pytorch_model.bin": b"old", "consolidated.safetensors": b"own", "README.md": b"#"}
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
    without = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub = Hub(
        repos={
            "models/some/tiny": files,
            "models/some/bins": {**without, "consolidated.safetensors": b""},
            "models/some/shards": {**without, "model.safetensors.index.json": index},
            "models/some/adapter": {"adapter_config.json": b"{}"},
            "datasets/some/talks": {
                "train.jsonl": make_conversations(folder / "a.jsonl").read_bytes()
            },
            "datasets/some/pairs": {"train.jsonl": make_pairs(folder / "b.jsonl").read_bytes()},
        },
        refusals={
            f"{kind}/some/{name}": refusal
            for kind in ("models", "datasets")
            for name, refusal in {
                "gated": (403, "GatedRepo"),
                "private": (401, "RepoNotFound"),
            }.items()
        }
        | {"models/some/broken": (500, "")},
    )
    with serving(hub):
        yield hub


@pytest.fixture(scope="module")
def shell(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in an empty folder."""
    shell = Shell(hub.address, tmp_path_factory.mktemp("home"))
    yield shell
    shell.close()


def train(stage: str, model: str, data: str, output: str, *flags: str) -> list[str]:
    """A short training command."""
    short = [
        "--max_length",
        "200",
        "--max_prompt_length",
        "150",
        "--max_steps",
        "2",
        "--batch_size",
        "4",
    ]
    names = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output]
    return [stage, *names, *short, *flags]


def test_a_rehearsal_fetches_no_weights_and_takes_data_by_its_id(hub: Hub, shell: Shell) -> None:
    stage = "{data: some/talks, max_length: 200, batch_size: 4, lora: {rank: 2}}"
    text = f"name: r\nmodel: some/tiny\noutput_dir: run\nsft: {stage}\n"
    (shell.home / "rehearsed.yaml").write_text(text)
    code, said = shell.run("rehearse", "rehearsed.yaml", "--records", "8", "--steps", "2")
    assert code == 0, said
    assert "8 of 24 rows of some/talks: 8 trained" in said
    asked = " ".join(hub.asked)
    assert "config.json" in asked
    assert "model.safetensors" not in asked
    assert not (shell.home / "run").exists()


def test_both_stages_take_model_and_data_by_their_hub_ids(hub: Hub, shell: Shell) -> None:
    code, said = shell.run(*train("sft", "some/tiny", "some/talks", "sft"))
    assert code == 0, said
    assert "24 of 24 records" in said
    fetched = {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET /some/tiny/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "README.md"}
    adapter = read_json(shell.home / "sft" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == "some/tiny"
    merge = [
        "merge",
        "--base-model-path",
        "some/tiny",
        "--lora-model-path",
        "sft",
        "--output-path",
        "merged",
    ]
    code, said = shell.run(*merge)
    assert code == 0, said
    flags = ("--dataset_revision", COMMIT)
    code, said = shell.run(*train("dpo", "merged", "some/pairs", "dpo", *flags))
    assert code == 0, said
    before = len(hub.asked)
    code, said = shell.run(*train("sft", "some/tiny", "some/talks", "sft"))
    assert (code, "finished with these inputs" in said) == (0, True)
    assert not any(line.startswith("GET /some/tiny/") for line in hub.asked[before:])


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("some/none", [], "the Hub has no model of that name"),
        ("some/private", [], "the Hub has no model of that name"),
        ("some/gated", [], "it is gated: accept its conditions"),
        ("some/broken", [], "500 Internal Server Error"),
        ("some/tiny", ["--model_revision", "old"], "no revision old; check model_revision"),
        ("some/adapter", [], "holds an adapter, not a whole model"),
    ],
)
def test_a_model_that_the_hub_refuses(shell: Shell, name: str, flags: list[str], said: str) -> None:
    code, message = shell.run(*train("sft", name, "some/talks", "refused", *flags))
    assert code == 2
    assert said in message
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    assert not (shell.home / "refused").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("some/bins", "has no model.safetensors, and no model.safetensors.index.json"),
        ("some/shards", "lacks model-00001-of-00002.safetensors"),
    ],
)
def test_a_page_without_weights_that_can_be_loaded_is_refused_before_the_first_stage(
    shell: Shell, name: str, said: str
) -> None:
    sft = "{data: gone.jsonl, max_length: 200, max_steps: 2}"
    (shell.home / "gone.jsonl").write_text("{}\n")
    (shell.home / "recipe.yaml").write_text(
        f"name: r\nmodel: {name}\noutput_dir: refused\nsft: {sft}\n"
    )
    code, message = shell.run("run", "recipe.yaml")
    assert code == 2
    assert f"model {name} of the Hub" in message
    assert said in message
    assert not (shell.home / "refused").exists()


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("some/none", [], "doesn't exist on the Hub or cannot be accessed"),
        ("some/private", [], "doesn't exist on the Hub or cannot be accessed"),
        ("some/gated", [], "is a gated dataset"),
        ("some/talks", ["--dataset_revision", "old"], "Revision 'old' doesn't exist"),
        ("some/talks", ["--split", "test"], "(split 'test')"),
        ("some/talks", ["--subset", "french"], "'french' not found"),
        ("some/pairs", [], "holds preference pairs"),
    ],
)
def test_data_that_the_hub_refuses(shell: Shell, name: str, flags: list[str], said: str) -> None:
    code, message = shell.run(*train("sft", "some/tiny", name, "refused", *flags))
    assert code == 2
    assert f"data: {name}" in message
    assert said in message
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    assert not (shell.home / "refused").exists()


def test_without_a_network_what_was_fetched_before_is_enough(hub: Hub, shell: Shell) -> None:
    hub.close()
    finished = shell.run(*train("sft", "some/tiny", "some/talks", "sft"))
    code, said = shell.run(*train("sft", "some/other", "some/talks", "refused"))
    assert finished[0] == 0
    assert "finished with these inputs" in finished[1]
    assert code == 2
    assert "check the network" in said
