"""Runs that train all weights: their stages, their model, their report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tandem.cli.main import main
from tandem.recipe.recipe import Recipe, result_of, stages_of
from tandem.report.run_facts import read_run, run_warnings
from tandem.storage.run_folder import model_in_run

from ..pins.pinned import SMALL

FULL = ("sft.full=true", "sft.lora=null", "dpo.full=true", "dpo.lora=null")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in a few steps, all weights trained in both stages."""
    home = tmp_path_factory.mktemp("full")
    words = ("one", "two", "three", "four")
    data = {
        "instructions": [{"instruction": f"Say {n}.", "output": f"{n}."} for n in words],
        "prompts": [{"question": f"Count to {n}.", "answer": f"Yes: {n}."} for n in words],
        "questions": [{"question": "What is two?", "answer": "A number."}],
    }
    for name, rows in data.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        arguments = ["run", "demo", "output_dir=run", *SMALL, *FULL]
        assert main(arguments) == 0
        assert main(arguments) == 0, "a finished run is recognised"
    return home / "run"


def test_no_stage_merges_and_the_last_one_has_the_model(run: Path) -> None:
    assert sorted(p.name for p in run.iterdir() if p.name[0].isdigit()) == [
        "1-sft", "3-pairs", "4-dpo", "6-evaluation",
    ]  # fmt: skip
    assert model_in_run(str(run)) == str(run / "4-dpo")
    first, last = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("1-sft", "4-dpo"))
    before, after = (dict(model.named_parameters()) for model in (first, last))
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in unmoved if "norm" not in name]
    assert "PATH_OF_THIS_FOLDER" in (run / "4-dpo" / "README.md").read_text()


def test_rounding_that_takes_what_training_changed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's base is stored in bfloat16, whose steps are larger than a short run's."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    arguments = ["sft", "--model_name_or_path", "demo:base", "--full", "true", "--max_steps", "2"]
    arguments += ["--dataset_name", str(tmp_path / "d.jsonl"), "--learning_rate", "1e-6"]
    arguments += ["--max_length", "200", "--warmup_steps", "0", "--batch_size", "1"]
    saved = {}
    for dtype in ("auto", "float32"):
        folder = tmp_path / dtype
        assert main([*arguments, "--output_dir", str(folder), "--save_dtype", dtype]) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("rounding to bfloat16 changes the weights by" in said) is (dtype == "auto")
        warnings = json.loads((folder / "summary.json").read_text())["warnings"]
        assert any("rounding to bfloat16" in one for one in warnings) is (dtype == "auto")
        saved[dtype] = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == {"auto": "bfloat16"}.get(dtype, dtype)
    trained = load_file(tmp_path / "auto" / "checkpoints" / "step-000002" / "trained.safetensors")
    for name, tensor in trained.items():
        assert torch.equal(saved["float32"][name], tensor)
        assert torch.equal(saved["auto"][name], tensor.bfloat16())


def test_the_report_misses_no_stage(run: Path) -> None:
    assert not [one for one in run_warnings(read_run(run)) if "partial" in str(one)]


def test_a_full_stage_leads_to_its_own_model() -> None:
    data: dict[str, Any] = {"data": ["x.jsonl"]}
    recipe = Recipe.model_validate(
        {"name": "r", "model": "m", "output_dir": "o", "sft": data, "dpo": data | {"full": True}}
    )
    assert [result_of(recipe, "sft"), result_of(recipe, "dpo")] == ["sft-merge", "dpo"]
    assert [stage.name for stage in stages_of(recipe)] == ["sft", "sft-merge", "dpo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "demo", "sft.full=true"], "lora has no effect with full: true"),
        (["run", "demo", *FULL, "quantization=nf4"], "sft.full trains all weights, which quant"),
        (
            ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o",
             "--full", "true", "--lora_rank", "4"],
            "--lora_rank is of an adapter, and --full true trains all weights",
        ),
    ],
)  # fmt: skip
def test_what_full_fine_tuning_excludes_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry-run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_weights_in_4_bits_are_refused_by_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    arguments = ["sft", "--model_name_or_path", "demo:base", "--output_dir", str(tmp_path / "o")]
    arguments += ["--dataset_name", str(tmp_path / "d.jsonl"), "--full", "true"]
    assert main([*arguments, "--quantization", "nf4", "--max_length", "200"]) == 2
    assert "weights in 4 bits (quantization: nf4) cannot be trained" in capsys.readouterr().err
    assert not (tmp_path / "o" / "manifest.json").exists()
