"""The benchmark at the recipe's own size, on a model so small that its figures mean nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import real_size
from tandem.storage.atomic_files import atomic_write_json

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 259, "max_position_embeddings": 512,
}  # fmt: skip


def test_the_model_is_one_that_transformers_loads(byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = real_size._SHAPE | TINY | {"num_hidden_layers": 3}
    real_size.write_model(tmp_path / "model", shape, tmp_path / "tokenizer")
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert 0.015 < float(model.lm_head.weight.detach().float().std()) < 0.025
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3


def test_every_stage_is_run_and_what_is_not_needed_any_more_removed(
    byte_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sentence that chat is asked for in a process of its own; the others are made up."""
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(real_size, "_SHAPE", real_size._SHAPE | TINY)
    monkeypatch.setattr(real_size, "_rates", lambda _: (2e11, 2e10))
    monkeypatch.setattr(real_size, "SHARED", tmp_path)
    for name in ("conversations/slimorca_format", "pairs/orca_dpo_pairs"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("{}\n" * 20 + "x" * 9000 + "\n")
    really, started = real_size._Runs.__call__, []

    def run(self: Any, name: str, command: list[str], notes: Any = tuple) -> real_size.Ran:
        started.append(command)
        if command[0] == "chat" and command[-1] == "20":
            return really(self, name, command, notes)
        for flag in ("--output_dir", "--output-path"):
            if flag in command:
                folder = Path(command[command.index(flag) + 1])
                folder.mkdir()
                said = {"tokens": 100, "train_seconds": 2.0, "steps": 2, "reference_computed": 3}
                atomic_write_json(folder / "summary.json", said | {"reference_seconds": 1.0})
        if command[0] == "merge":
            assert Path(command[2]).exists()
            model = Path(command[-1])
            real_size.shutil.rmtree(model)
            real_size.shutil.copytree(Path(command[2]), model)
        return real_size.Ran(name, 60.0, 2**30, 2**29, 10**9, 10**8, notes())

    monkeypatch.setattr(real_size._Runs, "__call__", run)
    text = real_size.main(
        ["--layers=2", "--device=cpu", f"--tokenizer={tmp_path / 'tokenizer'}",
         f"--scratch={tmp_path}"]
    )  # fmt: skip
    assert text in capsys.readouterr().out
    assert [command[0] for command in started] == [
        "sft", "merge", "dpo", "merge", "eval", "chat", "chat"
    ]  # fmt: skip
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "| sft", "| merge", "| dpo", "| merge", "| evaluation", "| chat, 20 tokens"
    ]  # fmt: skip
    assert rows[0][1:4] == ["1.0", "1.0 GiB", "0.5 GiB"]
    assert re.match(r"100 tokens in 2 s of 2 steps: \d+ GFLOP/s needed, \d+%", rows[0][6])
    assert "the reference of 3 pairs in 1 s" in rows[2][6]
    assert "On CUDA: not measured." in text
    assert not list(tmp_path.glob("tandem-bench-*"))


def test_a_disk_that_is_too_full_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_size, "write_model", lambda *_: pytest.fail("it was written"))
    monkeypatch.setattr(
        real_size.shutil, "disk_usage", lambda _: real_size.argparse.Namespace(free=10**9)
    )
    with pytest.raises(SystemExit, match=r"has 1\.0 GB free, and 31\.9 GB are needed"):
        real_size.main([f"--scratch={tmp_path}"])
