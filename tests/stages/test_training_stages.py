"""SFT and DPO through their public entry points: same parameters whatever the schedule."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.cli.main import main
from tandem.errors import Stopped, TandemError, UserError
from tandem.model.cpu.c_kernels import numerics
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.report.run_facts import read_run, run_warnings
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer
from tests.jobs import training_job

from ..warm.python import python
from .made_inputs import QUIET, make_conversations, make_model_folder, make_pairs


def settings(kind: str, file: Path, **changes: Any) -> SftSettings | DpoSettings:
    values: dict[str, Any] = {
        "data": (DataSource(path=str(file)),),
        "batch_size": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_length": 128,
        "logging_steps": 3,
        "save_steps": 2,
        "lora": LoraSettings(rank=4, alpha=8, dropout=0.1 if kind == "sft" else 0.0),
    } | changes
    return SftSettings(**values) if kind == "sft" else DpoSettings(**values)


def run(
    kind: str,
    model: Path,
    folder: Path,
    *,
    budget: int = 2048,
    seed: int = 1,
    console: Console = QUIET,
    runtime: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    data = folder.parent / f"{kind}.jsonl"
    if not data.exists():
        (make_conversations if kind == "sft" else make_pairs)(data)
    stage: Any = run_sft if kind == "sft" else run_dpo
    stage(
        training_job(
            settings(kind, data, **changes),
            model,
            folder,
            seed=seed,
            tokens_per_microbatch=budget,
            **(runtime or {}),
        ),
        console,
    )
    return load_file(folder / "adapter_model.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_schedule_does_not_change_the_parameters(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    whole = run(kind, tiny_model, tmp_path / "whole", budget=4096)
    # Every record alone, each computed once more in the backward.
    single = run(kind, tiny_model, tmp_path / "single", budget=1, gradient_checkpointing=True)
    assert distance(single, whole) < 5e-5
    other = run(kind, tiny_model, tmp_path / "other", seed=2)
    assert distance(other, whole) > 1e-2


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stopped_run_ends_with_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Into a second epoch.
    whole = run(kind, tiny_model, tmp_path / "whole", max_steps=6)
    taken = 0
    plain = trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        taken += 1
        if taken == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(Stopped, match="after step 5 of 6"):
            run(kind, tiny_model, tmp_path / "stopped", max_steps=6)
    resumed = run(kind, tiny_model, tmp_path / "stopped", max_steps=6)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    metrics = [read_jsonl(tmp_path / f / "metrics.jsonl") for f in ("whole", "stopped")]
    assert [line["step"] for line in metrics[1]] == [3, 6]
    steady = [{k: v for k, v in line.items() if k in ("loss", "grad_norm", "learning_rate")}
              for lines in metrics for line in lines]  # fmt: skip
    assert steady[:2] == steady[2:]


def test_a_resumed_run_may_be_given_another_budget_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("dpo", tiny_model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", _two_steps_then_crash)
        with pytest.raises(ZeroDivisionError):
            run("dpo", tiny_model, tmp_path / "changed")
    said: list[str] = []
    monkeypatch.setattr(
        "tandem.stages.training.context.log", lambda _, text, **__: said.append(text)
    )
    resumed = run("dpo", tiny_model, tmp_path / "changed", budget=64)
    assert any("tokens_per_microbatch 2048 -> 64" in line for line in said)
    assert distance(resumed, whole) < 5e-5


def test_kernels_and_order_are_recorded_and_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "tandem.stages.training.context.log", lambda _, text, **__: said.append(text)
    )
    whole = run("dpo", tiny_model, tmp_path / "whole")
    schedule = read_json(tmp_path / "whole" / "manifest.json")["schedule"]
    assert schedule["kernels"] == numerics()
    assert schedule["ordered_weights"] == torch.backends.mkldnn.is_available()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", _two_steps_then_crash)
        with pytest.raises(ZeroDivisionError):
            run("dpo", tiny_model, tmp_path / "crashed")
    # Less memory than at the first start changes nothing, for the order was recorded.
    monkeypatch.setattr("tandem.stages.training.execution._COPIES_SHARE", 0.0)
    resumed = run("dpo", tiny_model, tmp_path / "crashed")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not any("another schedule" in line for line in said)
    monkeypatch.setenv("TANDEM_KERNELS", "off")
    plain = run("dpo", tiny_model, tmp_path / "plain")
    assert distance(plain, whole) < 5e-5
    assert any("no C kernels: TANDEM_KERNELS=off" in line for line in said)


def _two_steps_then_crash(self: Any) -> None:
    training = self.training
    for step in itertools.islice(training.sampler.steps(0, 4), 2):
        self._take(step)
    training.stopping = True
    for callback in training.callbacks:
        callback.before_next_step(training)
    _crash()


KILLED = """
import os, sys, pathlib, time
print(os.getpid(), flush=True)
sys.path.insert(0, sys.argv[1])
from tandem.train.trainer import Trainer
from tests.stages.test_training_stages import run
take = Trainer._take
Trainer._take = lambda *step: (time.sleep(0.1), take(*step))[1]  # or it ends before it is killed
run(sys.argv[2], pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]), max_steps=9, save_steps=3)
"""


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_killed_run_ends_with_the_same_bits(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = run(kind, tiny_model, tmp_path / "whole", max_steps=9, save_steps=3)
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [python(), "-c", KILLED, str(root), kind, str(tiny_model), str(tmp_path / "killed")],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "other-cache")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert read_json(tmp_path / "killed" / "manifest.json")["status"] == "running"
    resumed = run(kind, tiny_model, tmp_path / "killed", max_steps=9, save_steps=3)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    steps = [line["step"] for line in read_jsonl(tmp_path / "killed" / "metrics.jsonl")]
    assert steps == [*range(3, 10, 3)]


def test_a_damaged_checkpoint_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    whole = run("sft", tiny_model, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.stages.training.train_stage.finish_stage", _crash)
        with pytest.raises(ZeroDivisionError):
            run("sft", tiny_model, tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "step-000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    resumed = run("sft", tiny_model, tmp_path / "damaged")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def _crash(*_: Any) -> None:
    raise ZeroDivisionError


def test_finished_is_recognised_and_other_inputs_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    run("sft", tiny_model, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    run("sft", tiny_model, tmp_path / "out", logging_steps=1)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"settings\.learning_rate: 0\.01 -> 0\.02"):
        run("sft", tiny_model, tmp_path / "out", learning_rate=0.02)
    with (tmp_path / "sft.jsonl").open("a") as file:
        file.write('{"conversations": []}\n')
    with pytest.raises(UserError, match="data"):
        run("sft", tiny_model, tmp_path / "out")


def test_the_second_run_needs_no_reference_pass(tiny_model: Path, tmp_path: Path) -> None:
    run("dpo", tiny_model, tmp_path / "a", max_steps=1)
    run("dpo", tiny_model, tmp_path / "b", learning_rate=1e-3, beta=0.5, seed=9, max_steps=1)
    assert read_json(tmp_path / "a" / "summary.json")["reference_computed"] == 24
    assert read_json(tmp_path / "b" / "summary.json")["reference_computed"] == 0


def test_a_changed_weight_misses_the_reference_store(tiny_model: Path, tmp_path: Path) -> None:
    run("dpo", tiny_model, tmp_path / "a", max_steps=1)
    other = make_model_folder(tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    run("dpo", other, tmp_path / "b", max_steps=1)
    assert read_json(tmp_path / "b" / "summary.json")["reference_computed"] == 24


def test_dpo_starts_at_ln_2_and_moves_the_right_way(tiny_model: Path, tmp_path: Path) -> None:
    run("dpo", tiny_model, tmp_path / "out", logging_steps=1, max_steps=20)
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < 0.6
    assert lines[-1]["rewards/margins"] > 0


def test_the_step_0_check_stops_a_wrong_reference(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.train import reference_logps

    plain = reference_logps._compute_unit
    monkeypatch.setattr(
        reference_logps,
        "_compute_unit",
        lambda *a: [(logp - 0.5, n) for logp, n in plain(*a)],
    )
    with pytest.raises(UserError, match="step-0 check"):
        run("dpo", tiny_model, tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.train.engines.engine import Engine

    plain, calls = Engine.score, 0

    def score(self: Engine, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(self, batch) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(Engine, "score", score)
    with pytest.raises(TandemError, match=r"loss of step 3 is not finite.*sft\.jsonl, row \d+"):
        run("sft", tiny_model, tmp_path / "out")


def test_the_folder_is_what_peft_expects_and_the_summary_adds_up(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    run("dpo", tiny_model, tmp_path / "out", max_steps=5)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["examples"] == 5 * 5 - 1
    assert summary["tokens"] + summary["shared_tokens"] < summary["padded_tokens"]
    assert summary["shared_tokens"] > 0
    assert summary["ledger"]["trained"] == 24
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert "### Assistant:" in tokenizer.chat_template
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000004"
    assert (checkpoint / "adapter_config.json").exists()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert model.peft_config["default"].r == 4


def test_a_stage_says_what_it_reads_and_what_it_does_not(tiny_model: Path, tmp_path: Path) -> None:
    """Of every data set, of those held out as well, and again where the data is found encoded."""
    row = {"prompt": "say a", "completion": "a it is", "by": {"name": "me"}, "id": 1}
    for name in ("plain", "rich", "held"):
        kept = {key: row[key] for key in ("prompt", "completion")} if name == "plain" else row
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(kept)}\n" * 8)
    held = {"path": f"{tmp_path}/held.jsonl", "fields": {"system": "by.name"}}
    changes = {
        "data": [{"path": f"{tmp_path}/{name}.jsonl"} for name in ("plain", "rich")],
        "validation": {"data": [held]},
        "max_steps": 1,
    }
    said = []
    for folder in ("first", "second"):
        with Console(file=StringIO(), width=200) as console:
            run("sft", tiny_model, tmp_path / folder, console=console, **changes)
        lines = console.file.getvalue().splitlines()
        said.append([line for line in lines if ".jsonl is " in line])
        summary = read_json(tmp_path / folder / "summary.json")
        assert summary["ledger"]["unread_keys"] == {f"{tmp_path}/rich.jsonl": ["by", "id"]}
        unread = summary["validation"]["ledger"]["unread_keys"]
        assert unread == {f"{tmp_path}/held.jsonl": ["id"]}
    assert said[0] == said[1] == [
        "sft: plain.jsonl is prompt and completion",
        "sft: rich.jsonl is prompt and completion; not read: by, id",
        "sft: held out: held.jsonl is prompt and completion; not read: id",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_flags_that_say_what_data_means_give_a_recipes_stage(
    kind: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"asked": f"say {n}", "good": f"{n} it is", "bad": f"not {n}"} for n in "abcdefgh"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ["completion=good"] if kind == "sft" else ["chosen=good", "rejected=bad"]
    argv = [kind, "--model_name_or_path", f"{tiny_model}", "--output_dir", f"{tmp_path}/out/{kind}"]
    argv += ["--dataset_name", f"{tmp_path}/own.jsonl", "--fields", "prompt=asked", *answers]
    argv += ["--max_steps", "2", "--batch_size", "2", "--chat_template", "bare", "--device", "cpu"]
    argv += ["--max_length", "256"]
    assert main([*argv, "--dry_run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    recipe = {name: shown[name] for name in ("model", "chat_template", "seed", "device")}
    recipe |= {"name": "own", "output_dir": str(tmp_path / "run"), kind: shown["settings"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["run", str(tmp_path / "own.yaml"), "--until", kind]) == 0
    (made,) = (tmp_path / "run").glob(f"*-{kind}")
    (tmp_path / "out").mkdir()
    made.rename(tmp_path / "out" / kind)
    capsys.readouterr()
    assert main(argv) == 0
    assert "is finished with these inputs; nothing to do" in capsys.readouterr().err
    answer = argv.index(answers[0])
    argv[answer] = argv[answer].replace("good", "bad")
    assert main(argv) == 2
    assert f"a finished {kind} stage with other inputs" in capsys.readouterr().err


def test_a_context_too_short_and_a_missing_target_are_named(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"max_length 300 exceeds .* 256"):
        run("sft", tiny_model, tmp_path / "a", max_length=300)
    with pytest.raises(UserError, match=r"'wq' fits no module .* q_proj"):
        run("sft", tiny_model, tmp_path / "b", lora=LoraSettings(target_modules=("wq",)))
    with pytest.raises(UserError, match="does not exist"):
        run("sft", tmp_path / "nowhere", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        run("sft", tmp_path / "empty", tmp_path / "d")


def test_two_runs_in_one_folder(tiny_model: Path, tmp_path: Path) -> None:
    from tandem.storage.folder_lock import folder_lock

    with folder_lock(tmp_path / "out"), pytest.raises(UserError, match="in use"):
        run("sft", tiny_model, tmp_path / "out")


def test_settings_that_nobody_means_are_said_before_the_first_step_and_kept(
    tiny_model: Path, tmp_path: Path
) -> None:
    said = StringIO()
    with Console(file=said, width=400) as console:
        run(
            "sft", tiny_model, tmp_path / "out", console=console, max_steps=2, batch_size=500,
            logging_steps=1, save_steps=3, warmup_steps=9,
        )  # fmt: skip
    warnings = read_json(tmp_path / "out" / "summary.json")["warnings"]
    assert [text.partition(":")[0].split()[0] for text in warnings] == [
        "batch_size", "warmup_steps", "save_steps",
    ]  # fmt: skip
    lines = said.getvalue().splitlines()
    first_step = next(i for i, line in enumerate(lines) if "step 1/2" in line)
    for text in warnings:
        assert lines.index(f"sft: {text}") < first_step
    assert [f.text for f in run_warnings(read_run(tmp_path / "out"))] == warnings
