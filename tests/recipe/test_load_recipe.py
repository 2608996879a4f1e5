"""Recipes from files and overrides, and what is said about mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.recipe.load import load_recipe, recipe_names, recipe_to_yaml
from tandem.recipe.section import DataSource

SMALL = """\
name: small
model: ./base
output_dir: runs/small
sft:
  data: train.jsonl
  learning_rate: 1e-4
dpo:
  data:
    - path: pairs.jsonl
      split: test
    - more.jsonl
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def _message(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def _file_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mistaken.yaml"
    path.write_text(text)
    return str(path)


def test_a_data_set_may_be_a_path_a_mapping_or_a_list_of_both(small: str) -> None:
    recipe = load_recipe(small)
    assert recipe.sft is not None
    assert recipe.dpo is not None
    assert recipe.sft.data == (DataSource(path="train.jsonl"),)
    assert recipe.dpo.data == (
        DataSource(path="pairs.jsonl", split="test"),
        DataSource(path="more.jsonl"),
    )


def test_a_number_without_a_dot_before_its_exponent_is_a_number(small: str) -> None:
    recipe = load_recipe(small)
    assert recipe.sft is not None
    assert recipe.sft.learning_rate == 1e-4


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_printed_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(tmp_path)) == recipe, "a run's folder stands for its recipe.yaml"


def test_overrides_are_typed_as_yaml(small: str) -> None:
    recipe = load_recipe(
        small,
        [
            "seed=7",
            "sft.lora.rank=8",
            "sft.lora.target_modules=[q_proj, v_proj]",
            "sft.gradient_checkpointing=true",
            "sft.max_grad_norm=null",
            "dpo.data.0.split=validation",
            "evaluate.samples=3",
            "chat_template=neural-chat",
            "name=2024-01-01",
        ],
    )
    assert recipe.sft is not None
    assert recipe.dpo is not None
    assert recipe.evaluate is not None
    assert recipe.seed == 7
    assert recipe.sft.lora.rank == 8
    assert recipe.sft.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.sft.gradient_checkpointing is True
    assert recipe.sft.max_grad_norm is None
    assert recipe.dpo.data[0] == DataSource(path="pairs.jsonl", split="validation")
    assert recipe.evaluate.samples == 3
    assert recipe.chat_template == "neural-chat"
    assert recipe.name == "2024-01-01", "what YAML takes for a date is text in a recipe"


def test_null_leaves_a_section_out(small: str) -> None:
    assert load_recipe(small, ["dpo=null"]).dpo is None


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("sft.learnig_rate=1e-3", "sft.learning_rate"),
        ("sft.lora.rnk=4", "sft.lora.rank"),
        ("sft.lora_rank=4", "sft.lora.rank"),
        ("sft.per_device_train_batch_size=4", "sft.batch_size"),
        ("sft.num_train_epochs=4", "sft.epochs"),
        ("sft.lr_scheduler_type=cosine", "sft.lr_scheduler"),
        ("dpo.betta=0.2", "dpo.beta"),
        ("dpo.data.1.splt=x", "dpo.data.1.split"),
        ("outputdir=x", "output_dir"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(
    tmp_path: Path, override: str, meant: str
) -> None:
    path = _file_with(tmp_path, SMALL.replace("- more.jsonl", "- path: more.jsonl"))
    key = override.partition("=")[0]
    assert _message(path, override) == (
        f"override {override}: unknown key {key}; did you mean {meant}?"
    )


def test_an_unknown_key_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = _file_with(tmp_path, SMALL.replace("learning_rate", "lerning_rate"))
    assert _message(path) == (
        f"{path}:6: unknown key sft.lerning_rate; did you mean sft.learning_rate?"
    )


def test_an_unknown_key_like_no_other_is_answered_with_the_valid_ones(small: str) -> None:
    assert "valid here: rank, alpha, dropout, target_modules" in _message(small, "sft.lora.zzz=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.batch_size=many", "sft.batch_size is 'many', but it must be a valid integer"),
        ("sft.batch_size='64'", "sft.batch_size is '64', but it must be a valid integer"),
        ("sft.batch_size=true", "sft.batch_size is true, but it must be a valid integer"),
        ("sft.batch_size=0", "sft.batch_size is 0, but it must be greater than 0"),
        ("sft.learning_rate=.inf", "sft.learning_rate is inf, but it must be a finite number"),
        ("seed=-1", "seed is -1, but it must be greater than or equal to 0"),
        (
            "device=tpu",
            "device is 'tpu', but it must be 'auto', 'cpu', 'cuda', 'hpu', 'xpu' or 'mps'",
        ),
        ("model=null", "model is null, but it must be a valid string"),
        ("tokens_per_microbatch=few", "'few', but it must be a valid integer or 'auto'"),
        ("sft=3", "sft must be a mapping of keys to values, not 3"),
        ("sft.data=[]", "sft.data is empty; it needs at least one entry"),
        ("sft.data=5", "sft.data is 5, but it must be a list"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(small: str, override: str, said: str) -> None:
    message = _message(small, override)
    assert message.startswith(f"override {override}: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("deepspeed_zero3", "unknown engine 'deepspeed_zero3'; did you mean deepspeed-zero3?"),
        ("fsdp", "unknown engine 'fsdp'; did you mean fsdp2?"),
        ("horovod", "unknown engine 'horovod'; it may be auto, single, ddp, deepspeed-zero2"),
        ("missing.json", "there is no DeepSpeed configuration missing.json; check the path"),
    ],
)
def test_an_unknown_engine_is_answered_with_the_nearest_one(
    small: str, engine: str, said: str
) -> None:
    assert f"override engine={engine}: engine: {said}" in _message(small, f"engine={engine}")


def test_an_engine_may_be_a_deepspeed_configuration(small: str, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text("{}")
    assert load_recipe(small, [f"engine={path}"]).engine == str(path)
    assert load_recipe(small, ["engine=deepspeed-zero3"]).engine == "deepspeed-zero3"


def test_a_wrong_value_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = _file_with(tmp_path, SMALL + "  beta: strong\n")
    assert _message(path) == (f"{path}:12: dpo.beta is 'strong', but it must be a valid number")


def test_every_mistake_has_its_line(small: str) -> None:
    lines = _message(small, "seed=x", "sft.epoch=3", "device=tpu").splitlines()
    assert len(lines) == 3


def test_keys_that_contradict_each_other_name_the_file_and_the_override(small: str) -> None:
    message = _message(small, "sft.epochs=2", "sft.max_steps=5")
    assert message == (
        f"{small} with sft.epochs=2 sft.max_steps=5: "
        "sft: epochs and max_steps are both set; keep one, the other is null"
    )


def test_a_missing_key_is_named_with_its_meaning(tmp_path: Path) -> None:
    path = _file_with(tmp_path, "name: x\nmodel: y\nsft: {data: d.jsonl}\n")
    assert _message(path) == (
        f"{path}: output_dir is missing (The run's folder; every stage gets a folder in it)"
    )


def test_a_recipe_that_trains_nothing_is_refused(small: str) -> None:
    assert "needs an sft section" in _message(small, "sft=null", "dpo=null")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", ":1: not valid YAML"),
        ("name: a\nname: b\n", ":2: not valid YAML: the key name is given twice"),
        ("sft:\n  data: x\n  data: y\n", ":3: not valid YAML: the key data is given twice"),
        ("a: &a [*a]\n", "an alias refers to itself"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("name: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = _file_with(tmp_path, text)
    message = _message(path)
    assert message.startswith(path)
    assert said in message


def test_a_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert _message(str(path)) == f"{path}: not a text file in UTF-8, so no recipe"


@pytest.mark.parametrize("override", ["seed", "=3", "sft..rank=3", ".seed=3"])
def test_an_override_that_is_none_is_answered_with_the_form(small: str, override: str) -> None:
    assert "write key=value" in _message(small, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.name=x", "model is './base', so it has no key name"),
        ("dpo.data.5.path=x", "dpo.data has 2 entries, counted from 0; there is no 5"),
        ("dpo.data.path=x", "dpo.data is a list; its entries are numbers from 0"),
        ("sft.3=x", "sft is a mapping, not a list"),
        ("name=[", "not valid YAML"),
    ],
)
def test_an_override_without_a_place_is_refused(small: str, override: str, said: str) -> None:
    assert said in _message(small, override)


def test_an_unknown_recipe_is_answered_with_the_shipped_ones(tmp_path: Path) -> None:
    message = _message("neural-chat")
    assert "Did you mean neural-chat-7b-v3-1?" in message
    assert "Shipped recipes: " in message
    missing = str(tmp_path / "no.yaml")
    assert _message(missing) == f"{missing}: no such file"
    assert "a folder without a recipe.yaml" in _message(str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sft.validation={}"], "set one of data, split and fraction"),
        (["sft.validation={fraction: 0.1, split: test}"], "split and fraction are set; keep one"),
        (["sft.validation.fraction=1"], "fraction"),
        (["sft.keep=best"], "keep: best needs a validation section"),
        (["sft.validation.fraction=0.1", "sft.keep=best", "sft.best_metric=margin"], "loss"),
        (["dpo.best_metric=margin"], "best_metric margin has no effect without keep: best"),
        (["sft.data={path: a.jsonl, weight: 0}"], "weight"),
        (
            ["sft.validation.data={path: a.jsonl, weight: 2}"],
            "weight 2 of a.jsonl has no effect here",
        ),
        (
            ["evaluate.questions={path: q.jsonl, weight: 0.5}"],
            "weight 0.5 of q.jsonl has no effect here",
        ),
        (
            ["pairs.prompts={path: p.jsonl, weight: 3}"],
            "weight 3 of p.jsonl has no effect here",
        ),
    ],
)
def test_what_is_held_out_and_weighed_must_make_sense(
    small: str, overrides: list[str], said: str
) -> None:
    assert said in _message(small, *overrides)


def test_held_out_records_and_weights_as_a_recipe_says_them(small: str) -> None:
    recipe = load_recipe(
        small,
        [
            "dpo.validation={data: v.jsonl, steps: 5}", "dpo.keep=best", "dpo.best_metric=accuracy",
            "sft.data=[{path: a.jsonl, weight: 0.5}, b.jsonl]", "sft.validation.split=test",
        ],
    )  # fmt: skip
    assert recipe.dpo is not None
    assert recipe.sft is not None
    assert recipe.dpo.validation is not None
    assert recipe.dpo.validation.data == (DataSource(path="v.jsonl"),)
    assert [source.weight for source in recipe.sft.data] == [0.5, 1.0]


def test_the_home_folder_is_resolved_where_the_recipe_is_read(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that every command that reads it looks in the same place."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_recipe(small, ["output_dir=~/runs"]).output_dir == "/home/someone/runs"
    assert load_recipe(small).output_dir == "runs/small"
    assert "output_dir" in _message(small, "output_dir=~nobody-of-this-name/runs")
