"""scripts/hpu_smoke.sh: what it calls is understood, with and without Habana's bridge.

`test_stub.py` lets one of its commands train.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.main import main

from .smoke_script import SCRIPT, run_script
from .test_stub import STUB


def test_bash_understands_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("bridge", [True, False])
def test_its_commands_are_understood(
    tmp_path: Path,
    bridge: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("PT_HPU_LAZY_MODE", "PT_ENABLE_INT64_SUPPORT"):
        monkeypatch.setenv(name, "0")  # a command sets them; they are as before after the test
    if bridge:
        monkeypatch.syspath_prepend(str(STUB))
    commands = run_script(tmp_path, "out", "--dry_run")
    said = {}
    for argv in commands:
        assert main(argv) == 0
        said[Path(argv[argv.index("--output_dir") + 1]).name] = capsys.readouterr().out
    assert len(said) == 10
    assert "device: hpu" in said["dpo-lazy-float32"]
    assert "lazy_mode: true" in said["dpo-lazy-float32"]
    assert "buckets: max" in said["sft-pad-max"]
    assert "habana_frameworks.torch" not in sys.modules


def test_how_its_commands_ended_is_kept_and_said(tmp_path: Path) -> None:
    run_script(tmp_path, "well")
    codes = sorted((tmp_path / "well").glob("*.code"))
    assert len(codes) == 10
    assert {code.read_text().strip() for code in codes} == {"0"}
    said = (tmp_path / "well.txt").read_text()
    assert "all commands ended with 0" in said
    assert "Please send back" in said
    run_script(tmp_path, "badly", code=1, FAIL="dpo", ONLY="*-lazy-float32")
    assert {c.name: c.read_text() for c in (tmp_path / "badly").glob("*.code")} == {
        "sft-lazy-float32.code": "0\n",
        "dpo-lazy-float32.code": "1\n",
    }
    assert "failed: dpo-lazy-float32" in (tmp_path / "badly.txt").read_text()
