"""The benchmark's machinery on a model so small that its figures mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from benchmarks import roofline, sides, training, work
from tandem.data.records import Branch, Origin, Tree


class Here:
    """Measures in this process, and looks at what it is asked for."""

    def __init__(self, threads: int) -> None:
        assert threads == 1

    def measure(self, task: work.Work) -> work.Measured:
        return sides.measure(task)

    def gemm_rate(self) -> float:
        return 1e9


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def files(byte_tokenizer: Any, tmp_path: Path) -> list[str]:
    """A small tokenizer and a few records, as options."""
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    pairs = [
        {
            "system": "",
            "question": f"What is {n} and two?",
            "chosen": "It is four.",
            "rejected": "No",
        }
        for n in ("two", "four", "one")
    ]
    talks = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Hello"}]}
        for q in ("Hello there", "What?", "It is two.")
    ]
    for name, rows in (("pairs", pairs), ("talks", talks)):
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [
        "--size=1", "--pairs=2", "--conversations=3", "--batch-size=2", "--repeats=1",
        "--threads=1", f"--tokenizer={tmp_path / 'tokenizer'}",
        f"--pairs-file={tmp_path / 'pairs.jsonl'}",
        f"--conversations-file={tmp_path / 'talks.jsonl'}",
    ]  # fmt: skip


def test_every_side_of_both_stages_is_measured(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tables = training.main([*files, "--trl-batches", "1", "--trl-packed", "64"], apart=Here)
    printed = capsys.readouterr().out
    for stage, sides_of_stage in {
        "dpo": ["tandem", "plain loop", "TRL, 1 pair at a time"],
        "sft": ["tandem", "plain loop", "TRL, 1 sequence at a time", "TRL, packed to 64 tokens"],
    }.items():
        table = tables[stage]
        assert table in printed
        rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
        assert rows == ["side", *sides_of_stage]
        assert "Against TRL's best" in table
        assert "Roofline: " in table
        assert f"torch {torch.__version__}" in table
    assert "reference included on both sides" in tables["dpo"]


def test_a_measurement_runs_in_a_process_of_its_own(files: list[str], tmp_path: Path) -> None:
    work.write_model(1, tmp_path / "tokenizer", tmp_path / "model")
    task = work.Work(
        side="tandem",
        stage="dpo",
        model=str(tmp_path / "model"),
        data=str(tmp_path / "pairs.jsonl"),
        scratch=str(tmp_path),
        batch_size=2,
        threads=1,
    )
    measured = training.Apart(1).measure(task)
    assert measured.records == 3
    assert min(measured.loop_seconds, measured.reference_seconds) > 0
    assert 2**26 < measured.peak_bytes < 2**33
    broken = replace(task, data=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(SystemExit, match=r"tandem failed:[\s\S]*nowhere\.jsonl"):
        training.Apart(1).measure(broken)


def test_missing_data_is_said(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl is not here"):
        training.main([*files, f"--pairs-file={tmp_path / 'nowhere.jsonl'}"], apart=Here)
    with pytest.raises(SystemExit, match="has only 3 records, 9 were asked for"):
        training.main([*files, "--pairs=9", "--stage=dpo"], apart=Here)


def test_needed_operations_by_hand() -> None:
    config = MistralConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=None,
    )  # fmt: skip
    branch = [
        Branch(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool)) for length in (2, 3)
    ]
    prefix = Branch(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool))
    tree = Tree(prefix, tuple(branch), Origin("x", 1))
    # Fed: 4 prompt tokens, 1 and 2 answer tokens. The first branch's row runs on from the prompt.
    tokens = 4 + 1 + 2
    visible = (1 + 2 + 3 + 4 + 5) + (4 + 1) + (4 + 2)
    linear = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
    adapter = work.RANK * ((8 + 8) + (8 + 4) + (8 + 4))
    training_part = (4 * linear + 6 * adapter) * tokens + 3 * 4 * visible * 8 + 2 * 2 * 5 * 100 * 8
    reference = 2 * linear * tokens + 4 * visible * 8 + 2 * 5 * 100 * 8
    assert roofline.needed_operations([tree], config, "dpo") == training_part + reference
    assert roofline.needed_operations([tree], config, "sft") == training_part
