"""Recipes from files and overrides, and what is said about mistakes in them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.load_recipe import load_recipe, recipe_names, recipe_to_yaml
from tandem.recipe.yaml_lines import dump_yaml, parse_yaml

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
    path.write_bytes(b"\x89PNG\xff")
    message = f"{path}: not a text file in UTF-8, so no recipe; save it in UTF-8"
    assert _message(str(path)) == message


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


WHOLE = "name: x\nmodel: m\noutput_dir: o\nsft:\n  data: d.jsonl\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: 010", ":6: not valid YAML: 010 is octal, or hours and minutes, to YAML"),
        ("seed: 1:30", ":6: not valid YAML: 1:30 is octal, or hours and minutes, to YAML"),
        ("timeout_minutes: 1:30.5", ":6: not valid YAML: 1:30.5 is octal"),
        ("model_revision: 0123456", "or a text in quotes"),
        ("seed: !!int abc", "a value does not fit its type in YAML (invalid literal"),
        ("seed: !!timestamp x", "a value does not fit its type in YAML"),
        ("seed: " + "1" * 5000, "a value does not fit its type in YAML (Exceeds the limit"),
        ("? [a, b]\n: x", ":6: not valid YAML: a key is a list or a mapping; write a name"),
        ("description: " + "[" * 3000, "its lists are nested too deeply"),
        ("---\nname: y", "keep what belongs to one recipe, without a second ---"),
        ("\tseed: 1", "indent with spaces, not with tabs"),
        ('chat_template: "C:\\data"', "write the text in single quotes"),
        ('chat_template: "C:\\new"', "has a control character ('\\n')"),
        ("description: no", "description is false, but it must be a valid string; put a text in q"),
        ("description: 2024", "description is 2024, but it must be a valid string; put a text in"),
        ("seed: .inf", "seed is inf, but it must be a valid integer"),
    ],
)
def test_what_yaml_reads_as_nobody_means_it_is_refused(
    tmp_path: Path, line: str, said: str
) -> None:
    path = _file_with(tmp_path, f"{WHOLE}{line}\n")
    message = _message(path)
    assert message.startswith(path)
    assert said in message


@pytest.mark.parametrize(
    ("text", "number"), [("0x10", 16), ("1_000", 1000), ("+7", 7), ("0", 0), ("!!int '12'", 12)]
)
def test_whole_numbers_that_are_clear_are_read(small: str, text: str, number: int) -> None:
    assert load_recipe(small, [f"seed={text}"]).seed == number


def test_an_octal_override_is_refused(small: str) -> None:
    assert "override seed=010" in _message(small, "seed=010")


def test_keys_are_names_whatever_yaml_takes_them_for(small: str) -> None:
    fields = "{yes: a, on: b, 010: c, 1:30: d, null: e, 1e3: f, 2024-01-01: g}"
    recipe = load_recipe(small, [f"sft.data={{path: d.jsonl, fields: {fields}}}"])
    assert recipe.sft is not None
    names = ["yes", "on", "010", "1:30", "null", "1e3", "2024-01-01"]
    assert recipe.sft.data[0].fields == dict(zip(names, "abcdefg", strict=True))


@pytest.mark.parametrize("text", ["1e5", "1E+5", "yes", "010", "1:30", "2024-01-01", "~", "<<", ""])
def test_texts_that_look_like_something_else_are_printed_in_quotes(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text, text: 1}), "x")[0] == {"name": text, text: 1}


@pytest.mark.parametrize(
    "content",
    [
        WHOLE.encode("utf-16"),
        codecs.BOM_UTF16_BE + WHOLE.encode("utf-16-be"),
        WHOLE.encode("utf-8-sig"),
        WHOLE.replace("\n", "\r\n").encode(),
    ],
    ids=["utf-16", "utf-16-be", "utf-8 with a mark", "crlf"],
)
def test_recipes_as_editors_save_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert load_recipe(str(tmp_path / "r.yaml")).model == "m"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("$SCRATCH/run", "/scratch/run"),
        ("${SCRATCH}/run", "/scratch/run"),
        ("/a/$SCRATCH_2$SCRATCH", "/a/two/scratch"),
        ("~/run", "/home/somebody/run"),
        ("$TILDE/run", "/home/somebody/run"),
        ("cost$", "cost$"),
        ("100$.d", "100$.d"),
    ],
)
def test_variables_and_the_home_folder_are_resolved_in_every_path(
    small: str, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    for name, value in {
        "SCRATCH": "/scratch", "SCRATCH_2": "two", "HOME": "/home/somebody", "TILDE": "~",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    keys = (
        "model", "output_dir", "chat_template", "sft.data.0.path", "sft.validation.data.0.path",
        "pairs.prompts.0.path", "pairs.heldout.0.path", "pairs.model", "pairs.rank.reward_model",
        "pairs.filters.check", "pairs.select.decontaminate.0.path", "evaluate.questions.0.path",
        "evaluate.pairs.0.path", "evaluate.heldout.0.path", "evaluate.task_data",
    )  # fmt: skip
    sources = [key for key in keys if key.endswith(".0.path")]
    single = [f"{key.removesuffix('.0.path')}=[{{path: {written!r}}}]" for key in sources]
    rest = [f"{key}={written!r}" for key in keys if key not in sources]
    set_up = ["pairs.samples=2", "evaluate.tasks=[t]"]
    recipe = load_recipe(small, [*set_up, *single, *rest])
    plain = recipe.model_dump(mode="json")
    for key in keys:
        found = plain
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        assert (key, found) == (key, meant)


@pytest.mark.parametrize("written", ["$NOT_SET/run", "${NOT_SET}/run", "$EMPTY/run", "${A:-b}/run"])
def test_a_variable_that_is_not_set_is_named(
    small: str, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    message = _message(small, f"output_dir={written}")
    assert f"output_dir: {written}: the environment variable" in message
    assert "is not set, or it is empty" in message


def test_a_name_with_a_dollar_that_exists_is_left_alone(small: str, tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    assert load_recipe(small, [f"model={tmp_path}/a$b"]).model == f"{tmp_path}/a$b"
