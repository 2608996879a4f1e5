"""The recipes that ship: all load, and the seed's says the seed's values."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tandem.recipe.docs_page import reference_page
from tandem.recipe.load_recipe import load_recipe, recipe_names


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
