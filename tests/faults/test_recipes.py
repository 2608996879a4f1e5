"""Bad recipes and flags: the message names file and line, key, and what it may be."""

from __future__ import annotations

import json

import pytest

from .desk import Desk


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sft__lerning_rate": 1}, ["unknown key sft.lerning_rate", "sft.learning_rate?"]),
        ({"sft__learning_rate": "fast"}, ["sft.learning_rate is 'fast'", "valid number"]),
        ({"sft__max_steps": 2.5}, ["sft.max_steps is 2.5", "integer"]),
        ({"sft__lora": 16}, ["sft.lora must be a mapping"]),
        ({"sft": None, "dpo": None}, ["needs an sft section, a dpo section or both"]),
        ({"sft__epochs": 1}, ["epochs and max_steps are both set"]),
        ({"sft__data": None}, ["sft.data"]),
        ({"model": None}, ["model is null"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"pairs": {"keep": "wrong"}}, ["pairs.prompts is missing"]),
    ],
)
def test_keys_and_values(desk: Desk, changes: dict[str, object], said: list[str]) -> None:
    recipe = desk.recipe(**changes)
    message = desk.refused(["run", recipe], f"error: {recipe}", *said)
    assert message.count("\n") == 1


_ANSWERS = {"answers": ["one", "two", "three"], "scores": [3, 1, 2]}


@pytest.mark.parametrize(
    ("loss", "completions", "row"),
    [
        ("kto", None, {"completion": "a b", "label": True}),
        ("kto", None, {"chosen": "a b", "rejected": "c"}),
        ("kto", None, {"prompt_ids": [1, 3, 5], "chosen_ids": [4, 2], "rejected_ids": [6, 2]}),
        ("sigmoid", "all_pairs", _ANSWERS),
        ("info_nca", "ranked", _ANSWERS),
    ],
)
def test_a_run_that_begins_with_sft_takes_all_kinds_of_preference_data(
    desk: Desk, loss: str, completions: str | None, row: dict[str, object]
) -> None:
    """The data of the later stage is read before the first one begins."""
    rows = [{**row, "prompt": f"Question {n}?"} for n in range(4)]
    file = desk.text("".join(json.dumps(one) + "\n" for one in rows), "rows.jsonl")
    source = {"path": file, **({"completions": completions} if completions else {})}
    desk.accepted(["run", desk.recipe(dpo__data=[source], dpo__loss=loss)])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.max_steps=soon", "override sft.max_steps=soon: sft.max_steps is 'soon'"),
        ("sft.rank=3", "unknown key sft.rank; did you mean sft.lora.rank?"),
        ("sft.lora.rank", "write key=value"),
        ("sft=[", "override sft=[:1: not valid YAML"),
    ],
)
def test_overrides(desk: Desk, override: str, said: str) -> None:
    desk.refused(["run", desk.recipe(), override], said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"sft: [1, 2\nmodel: {", "recipe.yaml:2: not valid YAML"),
        (b"name: a\nname: b\n", "recipe.yaml:2: not valid YAML: the key name is given twice"),
        (b"name: caf\xe9\n", "recipe.yaml: not a text file in UTF-8"),
        (b"\x80\x02}q\x00.", "recipe.yaml: not a text file in UTF-8"),
        (b"a: 1\nname: a\x00b", "recipe.yaml:2: not valid YAML: special characters"),
        (b"- one\n- two\n", "recipe.yaml: a recipe is a mapping"),
        (b"", "recipe.yaml: a recipe is a mapping"),
        (b"a: !!python/object:os.system {}\n", "recipe.yaml:1: not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(desk: Desk, content: bytes, said: str) -> None:
    path = desk.home / "recipe.yaml"
    path.write_bytes(content)
    desk.refused(["run", str(path)], said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.yaml", "mine.yaml: no such file"),
        ("recipes/mine", "recipes/mine: no such file"),
        ("model", "model: a folder without a recipe.yaml"),
        ("dmeo", "Did you mean demo?"),
        ("~nobody-here/mine.yaml", "no such file"),
    ],
)
def test_recipes_that_are_not_there(desk: Desk, name: str, said: str) -> None:
    desk.refused(["run", name], said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"per_device_train_batch_size": 2}, ["--batch_size and --per_device_train_batch_size"]),
        ({"gradient_accumulation_steps": 2}, ["--batch_size and --gradient_accumulation_steps"]),
        ({"max_steps": 0}, ["--max_steps", "greater than 0"]),
        ({"max_steps": "many"}, ["--max_steps", "'many'"]),
        ({"learning_rate": -1}, ["--learning_rate", "greater than 0"]),
        ({"lora_rank": 0}, ["--lora_rank", "greater than 0"]),
        ({"lora_dropout": 1.5}, ["--lora_dropout", "less than 1"]),
        ({"max_prompt_length": 200}, ["max_prompt_length 200 leaves no room", "max_length 200"]),
        ({"num_train_epochs": 1}, ["--num_train_epochs and --max_steps"]),
        ({"dataset_name": None}, ["tandem sft needs --dataset_name"]),
        ({"learning_rates": 1}, ["unknown flag --learning_rates; did you mean --learning_rate?"]),
        ({"output_dir": "~nobody-here/out"}, ["--output_dir", "home"]),
    ],
)
def test_flags(desk: Desk, flags: dict[str, object], said: list[str]) -> None:
    message = desk.refused(desk.train(**flags), *said)
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (["--until", "train"], "--until train: this recipe's stages are sft, sft-merge, dpo"),
        (["--from", "pairs"], "--from pairs: this recipe's stages are"),
        (["--from", "dpo", "--until", "sft"], "--from dpo comes after --until sft"),
        (["--from", "dpo"], "1-sft, is not finished"),
    ],
)
def test_stages_that_cannot_be_chosen(desk: Desk, selection: list[str], said: str) -> None:
    desk.refused(["run", desk.recipe(), *selection], said)
