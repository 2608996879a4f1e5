"""scripts/hpu_smoke.sh: what it calls is understood, with and without Habana's bridge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .test_stub import ROOT, STUB, environment

SCRIPT = ROOT / "scripts" / "hpu_smoke.sh"


def test_bash_understands_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("bridge", [True, False])
def test_its_commands_are_understood(tmp_path: Path, bridge: bool) -> None:
    env = environment(tmp_path, PYTHON=sys.executable)
    if not bridge:
        env["PYTHONPATH"] = env["PYTHONPATH"].replace(str(STUB), "")
    ran = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out"), "--dry_run"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    codes = sorted((tmp_path / "out").glob("*.code"))
    assert len(codes) == 10
    assert {code.read_text().strip() for code in codes} == {"0"}
    lazy = (tmp_path / "out" / "dpo-lazy-float32.log").read_text()
    assert "device: hpu" in lazy
    assert "lazy_mode: true" in lazy
    assert "buckets: max" in (tmp_path / "out" / "sft-pad-max.log").read_text()
    assert "Please send back" in ran.stdout


def test_its_data_trains(tmp_path: Path) -> None:
    """One step of one command under the stub: nothing but the card is missing."""
    env = environment(tmp_path, PYTHON=sys.executable, STEPS="1", ONLY="sft-p*")
    ran = subprocess.run(
        ["bash", str(SCRIPT), "out"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all commands ended with 0" in ran.stdout
    assert [code.name for code in (tmp_path / "out").glob("*.code")] == ["sft-pad-max.code"]
    assert (tmp_path / "out" / "sft-pad-max" / "summary.json").is_file()
