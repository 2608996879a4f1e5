"""The recipes that ship: all load and are rehearsed; heads and published values are right."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.model.model_folder import load_tokenizer
from tandem.pipeline.rehearsal.rehearse import Scope, rehearse
from tandem.plan.model_shape import described
from tandem.recipe.docs_page import reference_page
from tandem.recipe.load_recipe import load_recipe, recipe_names
from tandem.recipe.recipe import stages_of
from tandem.recipe.shipped import shipped_recipes

from ..stages.made_inputs import WORDS, make_model_folder
from .planned_memory import planned, shape_of
from .shipped_models import CONFIGS, config_of


def test_demo_and_seed_ship() -> None:
    assert {"demo", "neural-chat-7b-v3-1"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_called_as_its_file_and_writes_to_its_own_folder(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.output_dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "mistralai/Mistral-7B-v0.1"),
        ("chat_template", "neural-chat"),
        ("dtype", "bfloat16"),
        ("sft.data", [("Open-Orca/SlimOrca", "train")]),
        ("sft.max_length", 2560),
        ("sft.max_prompt_length", 1024),
        ("sft.lora.rank", 16),
        ("sft.lora.alpha", 64),
        ("sft.lora.dropout", 0.05),
        ("sft.lora.target_modules", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("sft.adam_epsilon", 1e-6),
        ("sft.learning_rate", 1e-4),
        ("sft.lr_scheduler", "cosine"),
        ("sft.warmup_ratio", 0.03),
        ("sft.warmup_steps", None),
        ("sft.weight_decay", 0.0),
        ("sft.batch_size", 1 * 8 * 8),
        ("sft.epochs", 2),
        ("sft.max_steps", None),
        ("sft.save_steps", 1000),
        ("sft.save_total_limit", 10),
        ("sft.logging_steps", 10),
        ("pairs", None),
        ("dpo.data", [("Intel/orca_dpo_pairs", "train")]),
        ("dpo.batch_size", 8 * 8),
        ("dpo.learning_rate", 5e-4),
        ("dpo.max_steps", 1000),
        ("dpo.epochs", None),
        ("dpo.save_steps", 10),
        ("dpo.logging_steps", 10),
        ("dpo.lora.alpha", 16),
        ("dpo.lora.rank", 16),
        ("dpo.lora.dropout", 0.05),
        ("dpo.max_length", 1536),
        ("dpo.max_prompt_length", 1024),
        ("dpo.lr_scheduler", "cosine"),
        ("dpo.warmup_steps", 100),
        ("dpo.warmup_ratio", None),
        ("dpo.gradient_checkpointing", True),
        ("dpo.lora.target_modules", ("k_proj", "q_proj", "v_proj")),
        ("dpo.beta", 0.1),
    ],
)
def test_the_seed_recipe_says_the_seeds_value(key: str, value: object) -> None:
    found: Any = load_recipe("neural-chat-7b-v3-1")
    for part in key.split("."):
        found = getattr(found, part)
    if part == "data":
        found = [(source.path, source.split) for source in found]
    assert found == value


def test_the_recipes_are_package_data() -> None:
    assert files("tandem").joinpath("recipes", "demo.yaml").is_file()


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "guide" / "recipes.md"
    assert page.read_text() == reference_page(), (
        "run: python -m tandem.recipe.docs_page > docs/guide/recipes.md"
    )


# The tokenizers that are at hand; other families are rehearsed with one that is small and quick.
TOKENIZERS = {"mistralai": "mistral_v1_32000", "Qwen": "qwen3"}
# With a real one, whose large vocabulary takes most of the time.
REAL = {"neural-chat-7b-v3-1", "qwen3-4b-8gpu"}
_LAYERS = 6  # of more, the checks of the whole model's adapter take a second
MADE = [name for name in recipe_names() if name.endswith(("-24gb", "-8gpu"))]


@pytest.mark.parametrize("name", MADE)
def test_a_recipe_says_data_command_hardware_and_the_memory_that_plan_finds(name: str) -> None:
    (described,) = [one for one in shipped_recipes() if one.name == name]
    recipe, head = load_recipe(name), described.head
    eight = name.endswith("-8gpu")
    card = 40e9 if eight else 24e9
    memory = planned(recipe, card=card, processes=8 if eight else 1)
    words = ", ".join(
        f"{each.peak / 1e9:.1f} GB in {stage.upper()}" for stage, each in memory.items()
    )
    assert head["memory"].startswith(words), f"planned: {words}"
    assert "not measured" in head["memory"]
    # Room for the allocator's fragments and the context of CUDA.
    assert max(each.peak for each in memory.values()) < 0.8 * card
    assert head["hardware"] == ("eight GPUs with 40 GB or more" if eight else "one GPU with 24 GB")
    assert head["command"] == f"tandem run {name}" + (" --nproc 8" if eight else "")
    for section in (recipe.sft, recipe.dpo):
        for source in section.data if section else ():
            assert source.path in head["data"]
    assert ("needs" in head) == (recipe.quantization is not None)
    assert head["values"]
    assert "there are no figures of quality" in head["expect"]


def test_the_shape_of_a_deep_model_is_that_of_its_layers() -> None:
    model = "microsoft/Phi-4-mini-instruct"
    lora = load_recipe("phi-4-mini-24gb").dpo
    assert lora is not None
    whole = described(config_of(model), lora.lora, attention="auto").shape
    assert shape_of(model, lora.lora) == whole


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.learning_rate", 5e-6), ("sft.lr_scheduler", "linear"), ("sft.warmup_ratio", 0.03),
        ("sft.weight_decay", 0.0), ("sft.epochs", 2), ("sft.batch_size", 64 * 1 * 2),
        ("sft.max_length", 4096), ("sft.full", True), ("chat_template", "tulu"),
        ("dpo.learning_rate", 5e-7), ("dpo.lr_scheduler", "linear"), ("dpo.warmup_ratio", 0.1),
        ("dpo.weight_decay", 0.0), ("dpo.epochs", 1), ("dpo.batch_size", 8 * 1 * 16),
        ("dpo.max_length", 2048), ("dpo.loss", "sigmoid_norm"), ("dpo.beta", 5),
        ("dpo.full", True), ("dpo.gradient_checkpointing", True),
    ],
)  # fmt: skip
def test_tulu_3_is_as_its_authors_published_it(key: str, value: object) -> None:
    """allenai/open-instruct, docs/tulu3.md: the commands of the 8B model."""
    found: Any = load_recipe("llama-3.1-8b-8gpu")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.fixture(scope="module")
def hub_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with the keys that the data sets of shipped recipes have on the Hub."""
    folder = tmp_path_factory.mktemp("rows")
    chats, pairs = [], []
    for n, word in enumerate(WORDS * 2):
        asked = {"role": "user", "content": f"say {word} {n}"}
        good = {"role": "assistant", "content": f"{word} it is"}
        bad = {"role": "assistant", "content": "no"}
        chats.append({"prompt": asked["content"], "prompt_id": str(n), "messages": [asked, good]})
        pairs.append({
            "prompt": asked["content"], "prompt_id": str(n), "chosen": [asked, good],
            "rejected": [asked, bad], "messages": [asked, good], "score_chosen": 8.0,
            "score_rejected": 4.0,
        })  # fmt: skip
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tokenizer that has ChatML's tokens."""
    folder = make_model_folder(tmp_path_factory.mktemp("tokenizer"))
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "demo"])
def test_a_shipped_recipe_is_rehearsed(
    name: str,
    hub_rows: Path,
    small_tokenizer: Path,
    tmp_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped = load_recipe(name)
    source = small_tokenizer
    if name in REAL:
        source = shared_data / "tokenizers" / TOKENIZERS[shipped.model.partition("/")[0]]
    model = shutil.copytree(source, tmp_path / "model")
    values = json.loads(json.dumps(CONFIGS[shipped.model]))
    text = values.get("text_config", values)
    text["num_hidden_layers"] = _LAYERS
    if name not in REAL:
        text["vocab_size"] = 300
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values[key] = text[key] = 1
    (model / "config.json").write_text(json.dumps(values))
    chats, pairs = hub_rows / "chats.jsonl", hub_rows / "pairs.jsonl"
    data = [f"sft.data={chats}"] if shipped.sft else []
    data += [f"dpo.data={pairs}"] + ([f"evaluate.pairs={pairs}"] if shipped.evaluate else [])
    if shipped.evaluate and name.endswith("-8gpu"):  # as its twin for one GPU evaluates
        data = [*data[:-1], "evaluate=null"]
    recipe = load_recipe(name, [f"model={model}", *data])
    exported = name not in REAL  # a real vocabulary takes up to ten seconds
    scope = Scope(records=8, steps=1, export=exported)
    found = rehearse(recipe, scope, Console(quiet=True))
    assert found.failed == []
    stages = [stage.name for stage in stages_of(recipe)]
    assert [one.stage for one in found.findings if one.stage in stages] == stages
    known = exported and "gemma-3" not in name  # a multimodal model is no GGUF file of ours
    assert found.findings[-1].stage == ("export" if known else "report")
    ends = [
        one.text
        for one in found.findings
        if one.stage.endswith(" data") and "is trained" in one.text
    ]
    assert len(ends) == len([section for section in (recipe.sft, recipe.dpo) if section])
    assert all("is trained in 8 of 8" in text for text in ends)
    assert found.seconds < 300
