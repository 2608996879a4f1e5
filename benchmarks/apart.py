"""Measurements in processes of their own, with nothing left over from the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .work import Measured, Work

ROOT = Path(__file__).resolve().parents[1]


class SideError(Exception):
    """A measurement's process ended with an error; the text is its last words."""


@dataclass(frozen=True)
class Apart:
    """Measures in a new process."""

    threads: int
    device: str = "cpu"

    def measure(self, work: Work) -> Measured:
        """One side's measurement; raises SideError."""
        module = "unsloth_side" if work.side == "unsloth" else "sides"
        found = self._run(module, work.as_dict())
        return Measured(**found | {"logps": tuple(found["logps"])})

    def gemm_rates(self) -> dict[str, float]:
        """Operations a second of a product, by the library that makes it."""
        return self._run("sides", {"threads": self.threads, "device": self.device})

    def _run(self, module: str, task: dict[str, Any]) -> dict[str, Any]:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(task)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SideError(done.stderr[-4000:] or f"exit code {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
