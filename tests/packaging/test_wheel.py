"""A built wheel, installed in an environment of its own outside the tree, runs the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tandem` of a fresh environment that holds the wheel and sees the dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves its working files beside the sources.
    source = work / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, source / name)
    _run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work / "dist"),
        str(source),
    )  # fmt: skip
    (wheel,) = (work / "dist").glob("tandem_tune-*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", str(work / "venv"))
    (packages,) = (work / "venv").glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files are not read: the
    # dependencies are found there, an editable tandem is not.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = work / "venv" / "bin" / "python"
    _run(
        sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
        "--no-index", str(wheel),
    )  # fmt: skip
    return work / "venv" / "bin" / "tandem"


def test_the_wheel_brings_its_data_and_nothing_else(command: Path, tmp_path: Path) -> None:
    (package,) = command.parents[1].glob("lib/python*/site-packages/tandem")
    for folder, pattern in (
        ("recipes", "*.yaml"),
        ("data/tokenize/chat_templates", "*.jinja"),
        ("report", "*.jinja"),
        ("model/cpu/kernels", "*.[ch]"),
        ("demo/base", "*"),
        (".", "py.typed"),
    ):
        ours = {path.name for path in (ROOT / "src" / "tandem" / folder).glob(pattern)}
        assert ours
        assert ours <= {path.name for path in (package / folder).iterdir()}, folder
    assert not list(package.parent.glob("tests*"))
    # The other shipped recipe, demo, is run below.
    shown = _run(str(command), "run", "neural-chat-7b-v3-1", "--dry-run", cwd=tmp_path)
    assert "name: neural-chat-7b-v3-1\n" in shown
    assert list(tmp_path.iterdir()) == []


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_demo_runs_from_another_folder(command: Path, tmp_path: Path) -> None:
    where = _run(
        str(command.with_name("python")),
        "-c",
        "import tandem; print(tandem.__file__)",
        cwd=tmp_path,
    )
    assert where.startswith(str(command.parents[1]))
    assert "tandem run demo" in _run(str(command), "--help", cwd=tmp_path)
    shortened = (
        "sft.batch_size=8 sft.epochs=0.02 pairs.select.count=10 pairs.max_new_tokens=4 "
        "dpo.batch_size=8 dpo.epochs=1 evaluate.limit=4 evaluate.max_new_tokens=4"
    )
    out = _run(str(command), "run", "demo", *shortened.split(), cwd=tmp_path)
    assert "report.html" in out
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "demo" / "5-final" / "model.safetensors").exists()
