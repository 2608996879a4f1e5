"""A user's DeepSpeed file: the seed's shape is taken, what contradicts the recipe is an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.errors import UserError
from tandem.integrations.choose import choose_engine
from tandem.integrations.deepspeed.ds_config import own_config, read_config
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import SftSettings
from tandem.runtime.device import Device
from tandem.runtime.launch import Launch
from tandem.runtime.process_group import ProcessGroup
from tandem.train.engines.engine import Engine

SETTINGS = SftSettings(
    data=(DataSource(path="x"),),
    batch_size=64,
    learning_rate=1e-4,
    adam_epsilon=1e-6,
    warmup_steps=100,
    max_steps=1000,
)
RECIPE = (SETTINGS, "bfloat16", 8)
# As the public tutorial's repository has it.
SEED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
    },
    "zero_allow_untested_optimizer": True,
}


def chosen(name: str, count: int, weights: torch.dtype = torch.float32) -> Engine:
    """The engine of a name in the first of some processes, without the others."""
    cpu = torch.device("cpu")
    taken = SimpleNamespace(device=cpu, process_index=0, num_processes=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.train.engines.engine.Accelerator", lambda **_: taken)
        return choose_engine(
            name, Device(cpu, weights), ProcessGroup(Launch(0, count, 0, count)), SETTINGS
        )


def written(folder: Path, config: Any) -> Path:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    return path


def test_the_seeds_file_agrees_with_the_seeds_recipe(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, SEED), *RECIPE)
    assert config["zero_optimization"] == SEED["zero_optimization"]
    # What a step is stays with the recipe, precision and clipping as well.
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert not config.keys() & {"train_batch_size", "bf16", "gradient_clipping"}
    engine = chosen(str(tmp_path / "ds_config.json"), 8, torch.bfloat16)
    assert (engine.name, engine.sharded) == ("deepspeed-zero2", False)


def test_what_says_the_same_is_no_conflict(tmp_path: Path) -> None:
    same = {
        **SEED,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": "auto", "weight_decay": 0.0},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_num_steps": 100, "total_num_steps": "auto", "warmup_min_lr": 0.0},
        },
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    config = read_config(written(tmp_path, same), *RECIPE)
    assert config["zero_optimization"] == same["zero_optimization"]


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"train_batch_size": 32}, "train_batch_size 32, batch_size 64"),
        (
            {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4},
            "train_micro_batch_size_per_gpu 1 x gradient_accumulation_steps 4 x 8 processes = 32, "
            "batch_size 64",
        ),
        (
            {"train_micro_batch_size_per_gpu": 3},
            "train_micro_batch_size_per_gpu 3 x 8 processes = 24, batch_size 64",
        ),
        (
            {"gradient_accumulation_steps": "8"},
            "gradient_accumulation_steps 8, which must be whole numbers above 0",
        ),
        ({"gradient_clipping": "high"}, "gradient_clipping high, max_grad_norm 1.0"),
        ({"gradient_clipping": 0.3}, "gradient_clipping 0.3, max_grad_norm 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled false, dtype bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled true, dtype bfloat16"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb, optimizer adamw"),
        (
            {"optimizer": {"params": {"lr": 3e-4}}},
            "optimizer.params.lr 0.0003, learning_rate 0.0001",
        ),
        ({"optimizer": {"params": {"amsgrad": True}}}, "amsgrad True, which no key of the recipe"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type WarmupLR, lr_scheduler cosine"),
        (
            {"scheduler": {"params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_num_steps 5, warmup_steps 100",
        ),
        (
            {"scheduler": {"params": {"total_num_steps": 500}}},
            "scheduler.params.total_num_steps 500, max_steps 1000",
        ),
        ({"scheduler": {"params": {"warmup_min_lr": 1e-6}}}, "warmup_min_lr 1e-06, warm-up from 0"),
        ({"scheduler": {"params": {"cos_min_ratio": 0.1}}}, "cos_min_ratio 0.1, min_lr_ratio 0.0"),
    ],
)
def test_conflicts_name_both_values(tmp_path: Path, change: dict[str, Any], both: str) -> None:
    with pytest.raises(UserError, match="contradict each other") as caught:
        read_config(written(tmp_path, {**SEED, **change}), *RECIPE)
    assert both in str(caught.value)


def test_no_clipping_is_zero_for_deepspeed(tmp_path: Path) -> None:
    path = written(tmp_path, {**SEED, "gradient_clipping": 0.0})
    read_config(path, SETTINGS.model_copy(update={"max_grad_norm": None}), *RECIPE[1:])
    with pytest.raises(UserError, match=r"gradient_clipping 0\.0, max_grad_norm 1\.0"):
        read_config(path, *RECIPE)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**SEED, "flops": 1}, "tandem has no use for flops; remove it"),
        ({**SEED, "activation_checkpointing": {}, "amp": {}}, "activation_checkpointing, amp; rem"),
        ({**SEED, "zero_optimization": {"stage": 0}}, "must be 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, "must be 1, 2 or 3"),
        ([1], "not a JSON object"),
        ({**SEED, "bf16": True}, "bf16 is True, but it must be an object"),
        ({**SEED, "optimizer": "AdamW"}, "optimizer is 'AdamW', but it must be an object"),
        ({**SEED, "zero_optimization": 2}, "zero_optimization is 2, but it must be an object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_config(written(tmp_path, config), *RECIPE)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(UserError, match=f"{name} cannot be read as JSON"):
            read_config(tmp_path / name, *RECIPE)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_by_name(stage: int) -> None:
    engine = chosen(f"deepspeed-zero{stage}", 2)
    assert engine.name == f"deepspeed-zero{stage}"
    assert engine.sharded == (stage == 3)
    assert own_config(stage)["zero_optimization"] == {"stage": stage}


def test_single_refuses_several_processes() -> None:
    with pytest.raises(UserError, match="engine: single was asked for, but a launcher started 2"):
        chosen("single", 2)
    assert chosen("auto", 2).name == "ddp"
    assert chosen("auto", 1).name == "single"
