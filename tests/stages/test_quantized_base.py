"""QLoRA through the stages: schedules, resume, the reference, and a merge into what was seen."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import Stopped, UserError
from tandem.model.load_model import load_adapter, load_base, load_for_inference, load_model
from tandem.model.model_folder import QUANTIZATION
from tandem.model.quantize import dequantized, quantized_of, read_record
from tandem.stages.dpo import run_dpo
from tandem.stages.merge import run_merge
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer
from tests.jobs import merge_job, training_job

from ..invariants.orders import ROOT, torchrun
from .made_inputs import QUIET, make_conversations, make_model_folder, make_pairs
from .test_training_stages import distance, settings


def run(
    kind: str, model: Path, folder: Path, *, quantization: str | None = "nf4", **changes: Any
) -> dict[str, Tensor]:
    data = folder.parent / f"{kind}.jsonl"
    if not data.exists():
        (make_conversations if kind == "sft" else make_pairs)(data)
    changes = {"max_steps": 3} | changes
    runtime = {
        "device": "cpu",
        "tokens_per_microbatch": changes.pop("budget", 4096),
        "dtype": changes.pop("dtype", "auto"),
        "quantization": quantization,
    }
    stage: Any = run_sft if kind == "sft" else run_dpo
    stage(training_job(settings(kind, data, **changes), model, folder, **runtime), QUIET)
    return load_file(folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    options: dict[str, Any] = {"dtype": "auto", "force": False, "device": "cpu"} | changes
    run_merge(merge_job(base, adapter, output, **options), QUIET)
    return load_file(output / "model.safetensors")


@pytest.fixture
def _other_precision() -> Iterator[None]:
    """accelerate keeps one number format for a whole process, unless told otherwise."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "sft"
    run("sft", tiny_model, folder)
    return folder


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_schedule_does_not_change_the_parameters(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    torch.set_float32_matmul_precision("high")  # as a user's own code may have
    large = run(kind, tiny_model, tmp_path / "4096")
    # Every record alone, each computed once more in the backward.
    single = run(kind, tiny_model, tmp_path / "1", budget=1, gradient_checkpointing=True)
    assert distance(single, large) < 5e-5
    assert torch.get_float32_matmul_precision() == "highest"
    summary = read_json(tmp_path / "4096" / "summary.json")
    assert (summary["quantization"], summary["float32_products"]) == ("nf4", "ieee")
    whole = run(kind, tiny_model, tmp_path / "whole", quantization=None)
    assert distance(whole, large) > 1e-2
    assert read_json(tmp_path / "whole" / "summary.json")["quantization"] is None
    if kind == "dpo":
        run(kind, tiny_model, tmp_path / "first", max_steps=1, logging_steps=1)
        (line,) = read_jsonl(tmp_path / "first" / "metrics.jsonl")
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-9)
        assert line["rewards/margins"] == 0.0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stopped_run_ends_with_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = run(kind, tiny_model, tmp_path / "uninterrupted")
    taken = 0
    plain = trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        taken += 1
        if taken == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(Stopped, match="after step 2 of 3"):
            run(kind, tiny_model, tmp_path / "stopped")
    with pytest.raises(UserError, match=r"model\.quantization: 'nf4' -> None"):
        run(kind, tiny_model, tmp_path / "stopped", quantization=None)
    resumed = run(kind, tiny_model, tmp_path / "stopped")
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_the_reference_store_tells_quantised_from_whole(tiny_model: Path, tmp_path: Path) -> None:
    computed = []
    for name, quantization in (("whole", None), ("first", "nf4"), ("second", "nf4")):
        run("dpo", tiny_model, tmp_path / name, quantization=quantization, max_steps=1)
        computed.append(read_json(tmp_path / name / "summary.json")["reference_computed"])
    assert computed == [24, 24, 0]


def test_merged_into_the_weights_that_were_seen(
    tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    record = read_record(trained)
    assert record is not None
    assert len(record.weights) == 14
    merged = merge(tiny_model, trained, tmp_path / "out")
    together = load_adapter(load_base(tiny_model, trained, dtype=torch.float32), trained)
    stored = load_file(tiny_model / "model.safetensors")
    for name, weight in merged.items():
        wanted = stored[name]
        if name in record.weights:
            layer = together.get_submodule("base_model.model." + name.removesuffix(".weight"))
            wanted = dequantized(layer.base_layer) + layer.get_delta_weight("default")
            assert float((weight - stored[name]).norm() / stored[name].norm()) > 0.05
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["quantization"] == "nf4"
    assert summary["logp_difference"] < 1e-5 < summary["adapter_effect"]
    assert not (tmp_path / "out" / QUANTIZATION).exists()
    # It is a plain model, which the next stage quantises again.
    assert quantized_of(load_model(tmp_path / "out", dtype=torch.float32)) is None
    run("dpo", tmp_path / "out", tmp_path / "dpo", max_steps=1)
    merge(tmp_path / "out", tmp_path / "dpo", tmp_path / "final")
    # Finished is recognised with the record among the inputs.
    merge(tiny_model, trained, tmp_path / "out")


def test_weights_without_an_adapter_are_those_that_were_seen(
    tiny_model: Path, tmp_path: Path
) -> None:
    from tandem.recipe.training_settings import LoraSettings

    run("sft", tiny_model, tmp_path / "sft", lora=LoraSettings(rank=4, target_modules=("q_proj",)))
    merged = merge(tiny_model, tmp_path / "sft", tmp_path / "out")
    base = load_base(tiny_model, tmp_path / "sft", dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(merged[f"{name}.weight"], dequantized(base.get_submodule(name)))


def test_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0,
                        eos_token_id=1)  # fmt: skip
    model = make_model_folder(tmp_path / "model", config=config)
    run("sft", model, tmp_path / "sft")
    record = read_record(tmp_path / "sft")
    assert record is not None
    assert record.transposed == record.weights
    merge(model, tmp_path / "sft", tmp_path / "out")
    assert read_json(tmp_path / "out" / "summary.json")["logp_difference"] < 1e-5


@pytest.mark.usefixtures("_other_precision")
def test_trained_and_merged_in_bfloat16(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    run("sft", model, tmp_path / "sft", dtype="bfloat16")
    for dtype in ("auto", "float32"):
        merged = merge(model, tmp_path / "sft", tmp_path / dtype, dtype=dtype)
        assert all(torch.isfinite(weight).all() for weight in merged.values())
    assert read_json(tmp_path / "float32" / "summary.json")["logp_difference"] < 5e-3


def test_another_merge_is_noticed(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record := trained / QUANTIZATION).rename(aside := tmp_path / QUANTIZATION)
    try:
        with pytest.raises(UserError, match=r"has no quantization\.json"):
            merge(tiny_model, trained, tmp_path / "out")
        whole = merge(tiny_model, trained, tmp_path / "whole", force=True)
    finally:
        aside.rename(record)
    from tandem.model import merge_sums as module

    original = module._add

    def add(name: str, weight: Tensor, *rest: Any) -> Tensor:
        """What merging into the original weights gives."""
        return whole.get(name, original(name, weight, *rest))

    monkeypatch.setattr(module, "_add", add)
    with pytest.raises(UserError, match="does not compute what base and adapter do"):
        merge(tiny_model, trained, tmp_path / "refused")


def test_an_adapters_folder_is_chatted_with_on_the_base_it_saw(trained: Path) -> None:
    model, _ = load_for_inference(str(trained), "cpu")
    assert quantized_of(model) == read_record(trained)


def test_a_quantised_folder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised already"):
        run("sft", folder, tmp_path / "sft")


def test_two_processes_train_what_one_does(tiny_model: Path, tmp_path: Path) -> None:
    # Into a second epoch.
    one = run("sft", tiny_model, tmp_path / "one", budget=60, max_steps=6)
    data, two = tmp_path / "sft.jsonl", tmp_path / "two"
    script = (
        "from pathlib import Path; from tests.stages.test_quantized_base import run; "
        f"run('sft', Path({str(tiny_model)!r}), Path({str(two)!r}), budget=60, max_steps=6)"
    )
    assert data.exists()
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [*torchrun(2), "-m", "script"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        },
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_json(two / "summary.json")["processes"] == 2
    assert distance(load_file(two / "adapter_model.safetensors"), one) < 5e-5
    record = (two / QUANTIZATION).read_bytes()
    assert record == (tmp_path / "one" / QUANTIZATION).read_bytes()
