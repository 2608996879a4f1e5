"""Training that goes on with an existing adapter (`lora.from`), which in DPO is the reference."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import UserError
from tandem.model.load_model import load_adapter, load_model
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.started import START
from tandem.model.model_folder import load_config
from tandem.pipeline.preflight import check_inputs
from tandem.plan.model_shape import described, shape_of
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.finished import training_is_finished
from tandem.stages.merge import run_merge
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import merge_job, training_job

from .made_inputs import QUIET, make_conversations, make_model_folder
from .stopped import dying_before
from .test_training_stages import distance, run

ADDED: dict[str, Any] = {
    "chat_template": "chatml", "added_tokens": ("<|im_start|>", "<|im_end|>", "</s>"),
}  # fmt: skip
# Adapters to go on with: their settings, and the run's.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rich": (
        {"dora": True, "rslora": True, "rank_pattern": {"down_proj": 2}, "plus_ratio": 2.0},
        {},
    ),
    "whole": ({"modules_to_save": ("norm", "embed_tokens", "lm_head")}, {}),
    "rows": ({}, ADDED),
    "4-bit": ({}, {"quantization": "nf4"}),
}


def started(folder: Path, **changes: Any) -> LoraSettings:
    return LoraSettings(**{"from": str(folder), **changes})


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind, (lora, runtime) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind) / "sft"
        settings = LoraSettings(**{"rank": 4, "alpha": 8, **lora})
        run("sft", tiny_model, folders[kind], lora=settings, runtime=runtime)
    return folders


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_sft_goes_on_from_the_adapters_weights(
    kind: str, tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A step at a rate of nearly nothing leaves them, and the configuration is the adapter's."""
    before, lora = adapters[kind], started(adapters[kind])
    after = run(
        "sft", tiny_model, tmp_path / "sft",
        lora=lora, learning_rate=1e-12, max_steps=1, runtime=KINDS[kind][1],
    )  # fmt: skip
    assert distance(after, saved(before)) < 1e-6
    changed = {"base_model_name_or_path", "target_modules", "peft_version"}
    configs = [read_json(folder / "adapter_config.json") for folder in (before, tmp_path / "sft")]
    assert sorted(configs[0]["target_modules"]) == sorted(configs[1]["target_modules"])
    for key in configs[0].keys() - changed:
        assert configs[0][key] == configs[1][key], key
    moved = run("sft", tiny_model, tmp_path / "on", lora=lora, runtime=KINDS[kind][1])
    assert distance(moved, saved(before)) > 1e-2
    run_merge(merge_job(tiny_model, tmp_path / "on", tmp_path / "merged"), QUIET)
    assert read_json(tmp_path / "merged" / "summary.json")["logp_difference"] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_dpo_is_the_model_with_the_adapter(
    kind: str,
    tiny_model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Also after a stop, with a store that is gone and weights that have moved."""

    def dpo(name: str) -> dict[str, Tensor]:
        lora, runtime = started(adapters[kind]), KINDS[kind][1]
        return run("dpo", tiny_model, tmp_path / name, lora=lora, logging_steps=1, runtime=runtime)

    whole = dpo("whole")
    lines = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    with dying_before(3):
        dpo("stopped")
    shutil.rmtree(tmp_path / "cache")
    resumed = dpo("stopped")
    assert read_json(tmp_path / "stopped" / "summary.json")["reference_computed"] == 24
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not (tmp_path / "whole" / START).exists()


def test_the_kept_adapter_computes_what_its_folder_does(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    ids = torch.tensor([[0, 5, 9, 30, 7]])
    for kind in ("plain", "rich", "whole"):
        model = load_model(tiny_model, dtype=torch.float32)
        weights = LoraWeights(started(adapters[kind]), keeps_start=True)
        adapted = weights.attach(model)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        with torch.no_grad():
            wanted = load_adapter(load_model(tiny_model, dtype=torch.float32), adapters[kind])
            for parameter in trained.values():
                parameter.mul_(2.0)
            with weights.reference(adapted):
                found = adapted(input_ids=ids).logits
            torch.testing.assert_close(found, wanted(input_ids=ids).logits)
            assert not torch.allclose(adapted(input_ids=ids).logits, found, atol=1e-2)
        assert {n: p.requires_grad for n, p in adapted.named_parameters()} == {
            name: name in trained for name, _ in adapted.named_parameters()
        }


def test_reference_log_probs_belong_to_the_adapter(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Those of another adapter, or of the model alone, are not taken for them; its own are."""
    computed = []
    for name, lora in (
        ("alone", LoraSettings(rank=4)),
        ("plain", started(adapters["plain"])),
        ("rich", started(adapters["rich"])),
        ("again", started(adapters["plain"])),
    ):
        run("dpo", tiny_model, tmp_path / name, lora=lora, max_steps=1)
        computed.append(read_json(tmp_path / name / "summary.json")["reference_computed"])
    assert computed == [24, 24, 24, 0]


def test_a_finished_stage_is_known_by_the_adapters_content(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapters["plain"], moved)
    values: dict[str, Any] = {
        "data": (DataSource(path=str(tmp_path / "sft.jsonl")),), "batch_size": 5, "max_steps": 1,
        "max_length": 128,
    }  # fmt: skip
    run("sft", tiny_model, tmp_path / "sft", lora=started(moved), **{**values, "data": ()} | {
        "data": values["data"], "learning_rate": 1e-2, "logging_steps": 3, "save_steps": 2,
    })  # fmt: skip

    def finished(lora: LoraSettings) -> bool:
        settings = SftSettings(
            **values, learning_rate=1e-2, logging_steps=3, save_steps=2, lora=lora
        )
        job = training_job(settings, tiny_model, tmp_path / "sft")
        return training_is_finished("sft", job, QUIET)

    assert finished(started(moved))
    assert finished(started(adapters["plain"]))
    with pytest.raises(UserError, match="adapter"):
        finished(started(adapters["rich"]))
    with pytest.raises(UserError, match="is no adapter folder"):
        finished(started(tmp_path / "nowhere"))


def _spoilt(adapter: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    return folder


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        ({"init_lora_weights": "pissa"}, {}, "its initialisation had changed"),
        ({}, {"rank": 16}, "lora.rank is 16, and the adapter that lora.from names has 4"),
        ({}, {"target_modules": "all-linear"}, "lora.target_modules is 'all-linear'"),
        ({}, {"dora": True}, "lora.dora is True"),
        ({}, {"alpha_pattern": {"q_proj": 3}}, "lora.alpha_pattern is {'q_proj': 3.0}"),
        ({"peft_type": "LOHA"}, {}, "type LOHA"),
        ({"r": 5}, {}, "does not fit its base model"),
        ({"target_modules": ["q_proj"]}, {}, "only the adapter has"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_adapter_that_does_not_go_with_the_settings_is_refused(
    spoil: Mapping[str, Any],
    changes: Mapping[str, Any],
    said: str,
    tiny_model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = _spoilt(adapters["plain"], tmp_path / "spoilt", **spoil)
    with pytest.raises(UserError) as error:
        run("sft", tiny_model, tmp_path / "sft", lora=started(folder, **changes))
    assert said in str(error.value)
    assert not (tmp_path / "sft").exists()


def test_settings_that_say_what_the_adapter_says_are_taken(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    targets = tuple(read_json(adapters["plain"] / "adapter_config.json")["target_modules"])
    lora = started(
        adapters["plain"], rank=4, alpha=8, target_modules=targets, rslora=False, rank_pattern={}
    )
    run("sft", tiny_model, tmp_path / "sft", lora=lora, max_steps=1)


def test_another_base_other_tokens_and_4_bits_are_refused(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = make_model_folder(tmp_path / "other", dtype=torch.bfloat16)
    for base, kind, runtime, said in (
        (other, "plain", {}, "was trained on other weights than those of"),
        (tiny_model, "rows", {}, "trains the rows of the tokens '</s>' (1)"),
        (tiny_model, "plain", ADDED, "none, and this stage those of '</s>' (1)"),
        (tiny_model, "4-bit", {}, "was trained on a base in 4 bits"),
    ):
        with pytest.raises(UserError) as error:
            run("sft", base, tmp_path / "sft", lora=started(adapters[kind]), runtime=runtime)
        assert said in str(error.value), kind
    with pytest.raises(UserError, match="is no adapter folder"):
        run("sft", tiny_model, tmp_path / "sft", lora=started(tiny_model))


def test_experts_go_on_in_sft_and_are_refused_in_dpo(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    base = make_model_folder(tmp_path / "base", config=config)
    run("sft", base, tmp_path / "first", lora=LoraSettings(rank=4))
    run("sft", base, tmp_path / "second", lora=started(tmp_path / "first"))
    with pytest.raises(UserError, match="adapts the experts of a mixture"):
        run("dpo", base, tmp_path / "dpo", lora=started(tmp_path / "first"))


def test_it_is_said_which_adapter_goes_on(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import io

    text = io.StringIO()
    lora = started(adapters["plain"])
    console = Console(file=text, width=500)
    run("sft", tiny_model, tmp_path / "sft", lora=lora, max_steps=1, console=console)
    assert f"goes on with the adapter {adapters['plain']} (rank 4, alpha 8)" in text.getvalue()


def test_what_is_printed_can_be_read_again() -> None:
    settings = DpoSettings(lora=started(Path("runs/x"), alpha=3.0))
    dumped = settings.model_dump(mode="json")
    assert dumped["lora"] == {
        "alpha": 3.0, "dropout": 0.0, "plus_ratio": 1.0, "init": "zero", "from": "runs/x",
    }  # fmt: skip
    assert DpoSettings.model_validate(dumped) == settings


def test_a_run_refuses_an_adapter_of_another_base_before_its_first_stage(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    def check(base: Path, lora: LoraSettings) -> None:
        make_conversations(tmp_path / "talks.jsonl")
        data = (DataSource(path=str(tmp_path / "talks.jsonl")),)
        section = SftSettings(data=data, max_length=128, lora=lora)
        check_inputs(Recipe(name="it", model=str(base), output_dir="out", sft=section), {"sft"})

    for kind in ("plain", "rich", "rows"):
        check(tiny_model, started(adapters[kind]))
    other = make_model_folder(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"other weights .*lora\.from: Name the model"):
        check(other, started(adapters["plain"]))
    with pytest.raises(UserError, match=r"sft\.lora\.rank is 3, and the adapter"):
        check(tiny_model, started(adapters["plain"], rank=3))


def test_a_plan_counts_the_adapter_that_goes_on(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    config = load_config(tiny_model)
    for kind in ("plain", "rich"):
        lora = started(adapters[kind])
        shape = described(config, lora, attention="auto").shape
        trained = sum(tensor.numel() for tensor in saved(adapters[kind]).values())
        assert shape.trained == trained
        model = load_model(tiny_model, dtype=torch.float32)
        kept = LoraWeights(lora, keeps_start=True).attach(model)
        assert shape_of(kept) == shape
