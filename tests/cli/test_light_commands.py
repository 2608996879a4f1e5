"""Which packages a command may import that needs no weights; and that it speaks at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem import __version__
from tandem.storage.folder_lock import folder_lock

from .fresh import Fresh, fresh, fresh_one_by_one

# Of settings; of what is drawn on a terminal; of tokenizers, templates and files of weights; of
# servers that judge.
SETTINGS = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions",
            "typing_inspection", "yaml"}  # fmt: skip
TERMINAL = {"rich", "filelock"}
TOKENS = {"tokenizers", "jinja2", "markupsafe", "numpy", "safetensors"}
SERVERS = {"httpx2", "idna", "brotli", "_brotli"}  # httpx2 takes brotli where it is installed
# What site-packages bring by themselves.
PYTHON = {"__main__", "tandem", "_distutils_hack", "sitecustomize", "usercustomize", "coverage",
          "cython_runtime"}  # fmt: skip

RECIPE = """\
name: little
model: demo:base
output_dir: run
chat_template: neural-chat
sft: {data: data.jsonl, max_length: 128, max_steps: 2, batch_size: 2}
"""
FIRST = f"tandem {__version__}: "


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(4)]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "little.yaml").write_text(RECIPE)
    model = home / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 9, "max_position_embeddings": 128})
    )
    (model / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return home


def check(found: Fresh, code: int, said: str, *allowed: set[str]) -> None:
    assert (found.code, said in found.err) == (code, True), found.err
    ours = {name for name in found.packages if not name.startswith(("_sysconfig", "_cython"))}
    assert ours <= PYTHON.union(*allowed)


WRONG = (
    (["run", "none.yaml"], "none.yaml: no such file"),
    (["run", "little.yaml", "sft.max_lenght=9"], "did you mean sft.max_length?"),
    (["run", "little.yaml", "--until", "sfft"], "this recipe's stages are sft, sft-merge"),
    (["plan", "none.yaml"], "none.yaml: no such file"),
    (["rehearse", "none.yaml"], "none.yaml: no such file"),
    (["recipes", "copy", "none"], "no recipe of that name ships"),
    (["sweep", "little.yaml", "sft.max_length=9,10"], "changes SFT"),
)


def test_wrong_words_need_settings_alone(home: Path) -> None:
    told = fresh_one_by_one([argv for argv, _ in WRONG], home=home)
    for (_, said), found in zip(WRONG, told, strict=True):
        assert found.err.count("\n") == 1
        check(found, 2, said, SETTINGS)


def test_recipes_are_listed_by_settings_alone(home: Path) -> None:
    found = fresh("recipes", home=home)
    assert "demo:base, two cores" in found.out
    check(found, 0, "", SETTINGS, TERMINAL)


WORDLESS = "nothing to measure"
NO_DATA = "data: there is no file or folder"
NO_MODEL = "model folder /none does not exist"
TOO_LONG = "max_length 129 exceeds the context of model, 128 tokens"
TUTORIAL = ("--dataset_name", "data.jsonl", "--output_dir", "out")


# Nothing of what one of them imports may be torch's, so they share a process.
MISSING = (
        (["eval", "demo:base"], WORDLESS),
        (["run", "little.yaml", "sft.data=none.jsonl"], NO_DATA),
        (["run", "little.yaml", "model=/none"], NO_MODEL),
        (["run", "little.yaml", "model=model", "sft.max_length=129"], f"sft.{TOO_LONG}"),
        (["run", "little.yaml", "sft.max_length=9999"], "sft.max_length 9999 exceeds the context"),
        (["plan", "little.yaml", "sft.data=none.jsonl"], NO_DATA),
        (["plan", "little.yaml", "model=model", "sft.max_length=129"], f"sft.{TOO_LONG}"),
        (["sft", "--model_name_or_path", "/none", *TUTORIAL], NO_MODEL),
        (["dpo", "--model_name_or_path", "model", "--max_length", "129", *TUTORIAL], TOO_LONG),
        (["merge", "--base-model-path", "/none", "--lora-model-path", "x", "--output-path", "y"],
         NO_MODEL),
        (["merge", "--base-model-path", "demo:base", "--lora-model-path", "x", "--output-path",
          "y"], "x is no adapter folder: it has no adapter_config.json"),
        (["pairs", "--prompts", "data.jsonl", "--model", "/none", "--output_dir", "y"], NO_MODEL),
        (["eval", "/none", "--questions", "data.jsonl"], NO_MODEL),
        (["chat", "/none"], NO_MODEL),
)  # fmt: skip


def test_what_is_not_there_or_too_long_is_told_without_torch(home: Path) -> None:
    told = fresh_one_by_one([argv for argv, _ in MISSING], home=home)
    for (_, said), found in zip(MISSING, told, strict=True):
        lines = found.err.splitlines()
        assert lines[0].startswith(FIRST) if said != WORDLESS else len(lines) == 1
        assert lines[-1].startswith("error: ")
        check(found, 2, said, SETTINGS, TERMINAL, TOKENS, SERVERS)


def test_a_folder_in_use_is_told_without_torch(home: Path) -> None:
    with folder_lock(home / "run" / "1-sft"):
        found = fresh("run", "little.yaml", home=home)
    assert found.err.startswith(f"{FIRST}little.yaml -> run, 2 stages\n")
    check(found, 2, "is in use by another tandem process", SETTINGS, TERMINAL, TOKENS)


def test_data_is_checked_and_shown_by_tokenizers_alone(home: Path) -> None:
    model = ("--model", "demo:base", "--chat_template", "neural-chat")
    shown = fresh("show", "data.jsonl", "--row", "1", *model, home=home)
    assert "trained | It is 0.</s>" in shown.out
    check(shown, 0, "", SETTINGS, TERMINAL, TOKENS)
    checked = fresh("check", "data.jsonl", *model, home=home)
    assert "4 records read as sft would" in checked.out
    check(checked, 0, "", SETTINGS, TERMINAL, TOKENS)
