"""An option is one field: all ways to say it, and to read it, are made from that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from tandem.cli import run, train
from tandem.errors import UserError
from tandem.recipe.docs_page import reference_page
from tandem.recipe.flags.tutorial_flags import job_from_flags
from tandem.recipe.load_recipe import load_recipe
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import SftSettings


class Smoothed(SftSettings):
    """Supervised fine-tuning with one more option."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of a target that all other tokens get."
    )


class SmoothedRecipe(Recipe):
    """A recipe with that option."""

    sft: Smoothed | None = Field(default=None, description="Supervised fine-tuning.")


def test_a_key_an_override_and_a_line_of_the_dry_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: a\nmodel: m\noutput_dir: o\nsft: {data: d, label_smoothing: 0.1}\n")
    recipe = load_recipe(str(file), kind=SmoothedRecipe)
    assert "  label_smoothing: 0.1\n" in run.dry_run_text(recipe, until=None, start=None)
    recipe = load_recipe(str(file), ["sft.label_smoothing=0.2"], kind=SmoothedRecipe)
    assert "  label_smoothing: 0.2\n" in run.dry_run_text(recipe, until=None, start=None)
    with pytest.raises(UserError, match=r"sft\.label_smoothing is 1, but it must be less than 1$"):
        load_recipe(str(file), ["sft.label_smoothing=1"], kind=SmoothedRecipe)


def test_a_flag_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    parser = train.stage_parser("sft", Smoothed)
    values = vars(parser.parse([*argv, "--label-smoothing", "0.3"]))
    job, _ = job_from_flags("sft", values, settings=Smoothed)
    assert "  label_smoothing: 0.3\n" in train.dry_run_text(job)
    with pytest.raises(UserError, match=r"^--label_smoothing is 2\.0, but it must be less than 1$"):
        job_from_flags("sft", values | {"label_smoothing": 2.0}, settings=Smoothed)
    parser.print_help()
    assert "Share of a target that all other tokens get." in capsys.readouterr().out


def test_a_line_of_the_reference_page() -> None:
    line = "| `label_smoothing` | number >= 0 and < 1 | `0` | Share of a target that all other "
    assert line in reference_page(SmoothedRecipe)
    assert line not in reference_page()
