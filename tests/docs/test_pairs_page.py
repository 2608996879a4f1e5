"""What docs/guide/pairs.md and rounds.md show works: recipes, a check, a table of reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tandem.cli.main import main
from tandem.recipe.load_recipe import load_recipe
from tandem.storage.atomic_files import read_json, read_jsonl

from .pages import ROOT, blocks

PAGE = ROOT / "docs" / "guide" / "pairs.md"
RECIPES = [block.text for block in blocks(PAGE, "yaml")]


def written(text: str, folder: Path) -> Path:
    """A recipe of the page as a file; a pairs section alone gets what a recipe must have."""
    whole = {"name": "shown", "model": "demo:base", "output_dir": "runs/shown"}
    path = folder / "shown.yaml"
    path.write_text(yaml.safe_dump(whole | yaml.safe_load(text), sort_keys=False))
    return path


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.splitlines()[0])
def test_a_shown_recipe_is_valid(text: str, tmp_path: Path) -> None:
    assert load_recipe(str(written(text, tmp_path))).pairs is not None


def test_the_recipe_with_rounds_is_valid(tmp_path: Path) -> None:
    (shown,) = blocks(ROOT / "docs" / "guide" / "rounds.md", "yaml")
    (path := tmp_path / "shown.yaml").write_text(shown.text)
    recipe = load_recipe(str(path))
    assert recipe.pairs is not None
    assert recipe.pairs.rank is not None
    assert recipe.rounds == recipe.pairs.parts == 3


def test_the_originals_recipe_makes_pairs_of_other_data(
    tmp_path: Path, stories_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is shown, but for the data, the model, the count and the answers' length."""
    (recipe,) = [text for text in RECIPES if "Open-Orca/SlimOrca" in text]
    monkeypatch.chdir(tmp_path)
    data = shared_data / "conversations" / "slimorca_format.jsonl"
    assert main([
        "run", str(written(recipe, tmp_path)), f"model={stories_path}", f"pairs.prompts={data}",
        f"pairs.model={stories_path}", "pairs.select.count=24", "pairs.max_new_tokens=16",
        "pairs.select.max_prompt_characters=300",
    ]) == 0  # fmt: skip
    folder = tmp_path / "runs" / "orca-pairs" / "3-pairs"
    rows = read_jsonl(folder / "pairs.jsonl")
    assert len({row["question"] for row in rows}) == len(rows) > 20
    summary = read_json(folder / "summary.json")
    assert summary["prompts"] == 24
    assert summary["left_out"]["not in the sample"] > 1000
    turns = [turn for row in read_jsonl(data) for turn in row["conversations"]]
    assert {row["chosen"] for row in rows} <= {t["value"] for t in turns if t["from"] == "gpt"}
    page = (tmp_path / "runs" / "orca-pairs" / "report.html").read_text()
    assert "Prompts left out by the selection" in page
    assert "not in the sample" in page


def test_the_shown_check_runs() -> None:
    (block,) = blocks(PAGE, "python")
    space: dict[str, object] = {}
    exec(block.text, space)
    check = space["check"]
    assert callable(check)
    assert check({"chosen": "It is 4.", "rejected": "Four, so 4"}) == "ends like the chosen answer"
    assert check({"chosen": "It is 4.", "rejected": "5"}) is True
