"""A tiny tokenizer and a few records, and a bench that measures in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import sides, work

from ..warm.python import python


class Here:
    """Measures in this process, and remembers what it was asked for."""

    def __init__(self, threads: int, device: str = "cpu") -> None:
        assert threads == 1
        self.asked: list[str] = []

    def measure(self, task: work.Work) -> work.Measured:
        self.asked.append(task.name)
        # What a process of its own would begin without: accelerate's mixed precision is global.
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return sides.measure(task)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def gemm_rates(self) -> dict[str, float]:
        return {"torch.mm": 1e9, "oneDNN": 2e9}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own are forks here: what they measure means nothing anyway."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.fixture
def files(byte_tokenizer: Any, tmp_path: Path) -> list[str]:
    """A small tokenizer and a few records of unequal lengths, as options."""
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    pairs = [
        {
            "system": "",
            "question": f"What is {n} and two?",
            "chosen": "It is four." * (1 + i),
            "rejected": "No",
        }
        for i, n in enumerate(("two", "four", "one"))
    ]
    talks = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("Hello there", "Hello"), ("What?", "What is four?"), ("It is two.", "Yes"))
    ]
    for name, rows in (("pairs", pairs), ("talks", talks)):
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [
        "--threads=1", f"--tokenizer={tmp_path / 'tokenizer'}",
        f"--pairs-file={tmp_path / 'pairs.jsonl'}",
        f"--conversations-file={tmp_path / 'talks.jsonl'}",
        f"--results={tmp_path / 'results'}",
    ]  # fmt: skip
