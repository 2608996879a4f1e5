"""torch.compile in a training stage: the same parameters, few graphs, none after the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import UserError
from tandem.model import elementwise
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer
from tests.jobs import training_job

from .made_inputs import QUIET, make_conversations, make_pairs
from .test_training_stages import distance, settings


def run(kind: str, model: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    data = folder.parent / f"{kind}.jsonl"
    if not data.exists():
        (make_conversations if kind == "sft" else make_pairs)(data)
    run = {
        "device": changes.pop("device", "cpu"),
        "tokens_per_microbatch": changes.pop("budget", 4096),
        "quantization": changes.pop("quantization", None),
        "compile": changes.pop("compile", True),
    }
    stage: Any = run_sft if kind == "sft" else run_dpo
    stage(training_job(settings(kind, data, **changes), model, folder, **run), QUIET)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_compiled_or_not_the_parameters_are_the_same(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(kind, tiny_model, tmp_path / "plain", compile=False)
    summary = read_json(tmp_path / "plain" / "summary.json")
    assert (summary["compile_seconds"], summary["compiled_graphs"]) == (0.0, 0)
    began: list[int] = []
    whole = trainer.Trainer.run

    def watched(self: Any) -> Any:
        began.append(elementwise._graphs())
        progress = whole(self)
        began.append(elementwise._graphs())
        return progress

    monkeypatch.setattr(trainer.Trainer, "run", watched)
    changes: dict[str, Any] = {"budget": 40}
    if kind == "sft":
        changes = {"budget": 200, "gradient_checkpointing": True}
    torch._dynamo.reset()
    found = run(kind, tiny_model, tmp_path / "compiled", **changes)
    assert distance(found, plain) < 5e-5
    # Bits differ: it was another computation.
    assert any(not torch.equal(found[n], plain[n]) for n in plain)
    summary = read_json(tmp_path / "compiled" / "summary.json")
    assert summary["compile_seconds"] > 0
    # A norm and a gate, with and without gradients, and a first norm that needs none.
    assert 0 < summary["compiled_graphs"] <= 6
    # All was compiled before the first step, whatever micro-batches came.
    assert began[-2] == began[-1]
    if kind == "dpo":
        assert read_jsonl(tmp_path / "compiled" / "metrics.jsonl")[0]["step"] == 3


def test_a_quantised_base_compiles_too(tiny_model: Path, tmp_path: Path) -> None:
    plain = run("sft", tiny_model, tmp_path / "plain", quantization="nf4", compile=False)
    found = run("sft", tiny_model, tmp_path / "compiled", quantization="nf4")
    assert distance(found, plain) < 5e-5


def test_a_compiler_that_fails_is_one_message(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain(function, backend=fail))
    with pytest.raises(UserError, match=r"compile: torch.compile fails here .*no compiler here"):
        run("sft", tiny_model, tmp_path / "sft")


def test_where_it_is_not_supported() -> None:
    elementwise.check_compile(False, device="hpu", sharded=True)
    elementwise.check_compile(True, device="cuda", sharded=False)
    with pytest.raises(UserError, match="not supported on hpu"):
        elementwise.check_compile(True, device="hpu", sharded=False)
    with pytest.raises(UserError, match="engine that shards"):
        elementwise.check_compile(True, device="cuda", sharded=True)
