"""Adapters that begin as the principal part of a weight compute what peft's PiSSA computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from tandem.errors import UserError
from tandem.model.load_model import load_adapter, load_model
from tandem.model.lora import principal
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.adapter_folder import read_updates
from tandem.model.lora.principal import principal_part, share_beginnings
from tandem.model.model_folder import load_config
from tandem.model.prepare_model import Preparation, prepare_model, speed_up_adapter
from tandem.model.trained_weights import trainable_parameters
from tandem.plan.model_shape import described
from tandem.plan.stage_estimate import disk_of
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.merge import run_merge
from tandem.storage.atomic_files import read_json
from tests.jobs import merge_job

from ..stages.made_inputs import QUIET, make_model_folder
from ..stages.stopped import dying_before
from ..stages.test_training_stages import run

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[0, 5, 9, 30, 7, 12, 3, 40]])
PISSA = LoraSettings(rank=4, alpha=6, init="pissa")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("principal") / "base")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ours(base: Path, lora: LoraSettings = PISSA, dtype: torch.dtype = torch.float32) -> Any:
    model = load_model(base, dtype=dtype)
    wrapped = LoraWeights(lora, base=str(base)).attach(model)
    return prepare_model(wrapped, (speed_up_adapter,), Preparation())


def theirs(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def move(model: Any) -> None:
    """Change what is trained, by the same numbers in any model."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(trainable_parameters(model).items())):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_it_is_pefts_pissa_and_is_saved_as_peft_converts_it(base: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for model in (ours(base), theirs(base)):
        began = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
        if model.peft_config["default"].init_lora_weights == "pissa":
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(str(tmp_path / "began"), save_embedding_layers=False)
        move(model)
        logits = model(input_ids=IDS).logits
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        gradients = {n: p.grad for n, p in trainable_parameters(model).items()}
        found.append((began, logits.detach(), gradients, model))
    (began, logits, gradients, model), (peft_began, peft_logits, peft_gradients, peft) = found
    torch.testing.assert_close(logits, peft_logits, rtol=0, atol=1e-5)
    for name, wanted in peft_gradients.items():
        torch.testing.assert_close(began[name], peft_began[name], rtol=0, atol=1e-6)
        assert (gradients[name] - wanted).norm() < 1e-4 * wanted.norm(), name
    (tmp_path / "ours").mkdir()
    LoraWeights(PISSA).save(model, tmp_path / "ours", trainable_parameters(model))
    peft.save_pretrained(
        str(tmp_path / "theirs"), save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "began"),
    )  # fmt: skip
    saved, wanted = (read_updates(tmp_path / name) for name in ("ours", "theirs"))
    assert saved.keys() == wanted.keys()
    for name in wanted:
        one: Any = saved[name]
        other: Any = wanted[name]
        assert one.a.shape == other.a.shape
        assert one.scaling == other.scaling
        torch.testing.assert_close(one.delta(), other.delta(), rtol=0, atol=1e-6)
    assert read_json(tmp_path / "ours" / "adapter_config.json")["r"] == 8
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_it_changes_no_bit_before_the_first_step(
    base: Path, dtype: torch.dtype, dora: bool
) -> None:
    model = ours(base, LoraSettings(rank=4, init="pissa", dora=dora), dtype)
    with torch.no_grad(), model.disable_adapter():
        wanted = model(input_ids=IDS).logits
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    if dora and dtype == torch.bfloat16:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)
    else:
        assert torch.equal(found, wanted)
    move(model)
    assert not torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-2)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_the_fast_way_finds_nearly_the_same_part() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 8) @ torch.randn(8, 60) + 0.1 * torch.randn(40, 60)
    parts = []
    for init in ("pissa", "pissa_fast"):
        left, values, right = principal_part(weight, 5, init)  # type: ignore[arg-type]
        assert left.shape == (40, 5)
        assert right.shape == (5, 60)
        parts.append((left * values) @ right)
    assert (parts[0] - parts[1]).norm() < 1e-3 * parts[0].norm()


def test_a_resumed_run_takes_the_beginnings_from_its_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine would find other last bits of the singular vectors."""
    whole = run("sft", base, tmp_path / "whole", lora=PISSA)
    with dying_before(3):
        run("sft", base, tmp_path / "stopped", lora=PISSA)

    def other(weight: Any, rank: int, init: Any) -> Any:
        left, values, right = principal_part(weight, rank, init)
        return -left, values * 1.001, -right

    monkeypatch.setattr(principal, "principal_part", other)
    resumed = run("sft", base, tmp_path / "stopped", lora=PISSA)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_all_processes_begin_as_the_first_does(base: Path) -> None:
    first, second = ours(base), ours(base, LoraSettings(rank=4, alpha=6, init="pissa_fast"))
    wanted = trainable_parameters(first)
    sent: dict[str, Any] = {}

    def on_rank0(work: Any) -> Any:
        return sent.setdefault("values", work())

    processes: Any = SimpleNamespace(count=2, on_rank0=on_rank0)
    share_beginnings(first, processes)
    share_beginnings(second, processes)
    assert all(torch.equal(p, wanted[n]) for n, p in trainable_parameters(second).items())
    assert torch.equal(second(input_ids=IDS).logits, first(input_ids=IDS).logits)


def test_a_base_in_4_bits_and_a_narrow_one_are_trained_and_merged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = make_model_folder(tmp_path / "narrow", dtype=torch.bfloat16)
    for folder, runtime in ((base, {"quantization": "nf4"}), (narrow, {})):
        if folder == narrow:
            monkeypatch.setattr("tandem.model.load_model._COMFORTABLE", 0.0)
        adapter = tmp_path / f"{folder.name}-sft"
        run("sft", folder, adapter, lora=PISSA, runtime=runtime)
        merged = tmp_path / f"{folder.name}-merged"
        run_merge(merge_job(folder, adapter, merged, dtype="float32"), QUIET)
        assert read_json(merged / "summary.json")["logp_difference"] < 1e-4
        chat = load_adapter(load_model(folder, dtype=torch.float32), adapter)
        assert chat.peft_config["default"].r == 8


def test_the_base_is_not_changed(base: Path) -> None:
    before, model = load_file(base / "model.safetensors"), ours(base)
    for name, weight in model.get_base_model().state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])


def test_what_cannot_begin_so_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.init: .*k_proj has 16 singular values, fewer than"):
        ours(base, LoraSettings(rank=17, init="pissa"))
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"lora\.init: pissa is not for the experts"):
        ours(make_model_folder(tmp_path / "experts", config=config))
    with pytest.raises(ValidationError, match="init pissa has no effect on an adapter that is"):
        LoraSettings.model_validate({"from": "runs/sft", "init": "pissa"})


def test_a_plan_counts_what_it_is_saved_with(base: Path) -> None:
    config = load_config(base)
    plain = described(config, LoraSettings(rank=4), attention="auto").shape
    shape = described(config, PISSA, attention="auto").shape
    assert (shape.trained, shape.kept, plain.kept) == (plain.trained, plain.trained, 0)
    assert shape.adapter == 2 * plain.adapter
    disk = disk_of(
        shape, SftSettings(data=(DataSource(path="x"),)), steps=4, save_steps=2, merged_bytes=4
    )
    assert (disk.adapter, disk.checkpoints) == (8 * plain.trained, 2 * 16 * plain.trained)
