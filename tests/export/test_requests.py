"""What is asked wrongly is named before anything is written."""

from __future__ import annotations

import io
import json
import shutil
import stat
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

import tandem.export.write_gguf
from tandem.cli.main import main
from tandem.errors import UserError
from tandem.export.choices import ExportJob
from tandem.export.export_gguf import export_gguf
from tandem.model.model_folder import model_folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *argv]) == 2
    return capsys.readouterr().err


def test_a_run_exports_its_newest_model(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.gguf"
    assert main(["export", "gguf", str(merged.parent), "--output", str(file)]) == 0
    told = capsys.readouterr()
    assert f"is a run; exporting its {merged}" in told.err
    assert told.out == f"exported: {file}\n"
    assert main(["export", "check", str(file), str(merged)]) == 0
    told = capsys.readouterr()
    assert "38 tensors compared (29 BF16, 9 F32), 38 of them bit for bit" in told.out
    assert told.out.endswith(f"{file} is {merged}\n")
    assert f"{file} exists" in refused(["gguf", str(merged), "--output", str(file)], capsys)


def test_an_adapter_is_to_be_merged_first(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(["gguf", str(adapter), "--output", str(tmp_path / "x.gguf")], capsys)
    assert "holds an adapter, not a whole model. Merge it into its base first: tandem merge" in told


def test_a_model_without_a_template_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(["gguf", "demo:base", "--output", str(tmp_path / "x.gguf")], capsys)
    assert "has no chat template" in told
    assert "--chat_template" in told


def test_a_quantised_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("demo:base"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    told = refused(["gguf", str(folder), "--output", str(tmp_path / "x.gguf")], capsys)
    assert "is quantised already (gptq)" in told
    assert "16-bit" in told


def test_the_missing_package_is_named_with_its_extra(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    told = refused(["gguf", str(merged), "--output", str(tmp_path / "x.gguf")], capsys)
    assert "needs the package gguf" in told
    assert "pip install '.[gguf]'" in told


def test_a_disk_without_room_is_named_before_anything_is_written(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    full = lambda _: type("Usage", (), {"free": 10**6})  # noqa: E731
    monkeypatch.setattr(tandem.export.write_gguf.shutil, "disk_usage", full)
    with pytest.raises(UserError, match=r"has 0\.0 GB free"):
        export_gguf(ExportJob(str(merged), tmp_path / "deep" / "x.gguf"), console)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["safetensors"], "safetensors is nothing to export. It is one of gguf, ollama, check"),
        (["guff"], "Did you mean 'gguf'?"),
        (["gguf", "demo:base"], "--output"),
        (["gguf", "/none/at/all", "--output", "x.gguf"], "/none/at/all does not exist"),
        (["gguf", "demo:base", "--output", "x", "--type", "q4_k_m"], "invalid choice"),
        (["check", "none.gguf", "demo:base"], "none.gguf is no file"),
        (["gguf", "demo:base", "--output", "x", "--converter", "/none.py"], "/none.py is no file"),
        (["gguf", "demo:base", "--output", "x", "--converter", "auto"], "is not on PATH"),
    ],
)
def test_wrong_words_are_named(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert named in refused(argv, capsys)


def _converter(folder: Path, what: str) -> Path:
    """A stand-in for llama.cpp's converter, which gets its arguments."""
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(f"import shutil, sys\nassert sys.argv[2] == '--outfile'\n{what}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_the_converters_file_is_compared_as_our_own(
    merged: Path, exported: Path, tmp_path: Path, console: Console
) -> None:
    """A converter that writes a right file, one that writes another model's, one that fails."""
    right = (
        f"assert sys.argv[4:] == ['--outtype', 'bf16']\nshutil.copy({str(exported)!r}, sys.argv[3])"
    )
    job = ExportJob(str(merged), tmp_path / "x.gguf", converter=_converter(tmp_path, right))
    assert export_gguf(job, console).read_bytes() == exported.read_bytes()
    (tmp_path / "x.gguf").unlink()
    other = tmp_path / "other.gguf"
    quiet = Console(file=io.StringIO())
    export_gguf(ExportJob("demo:base", other, chat_template="zephyr"), quiet)
    _converter(tmp_path, f"shutil.copy({str(other)!r}, sys.argv[3])")
    with pytest.raises(UserError, match=r"is not the model's weight"):
        export_gguf(job, console)
    _converter(tmp_path, "sys.exit('Model MistralForCausalLM is not supported')")
    with pytest.raises(UserError, match=r"wrote no file \(exit code 1\):\nModel Mistral"):
        export_gguf(job, console)
    assert not (tmp_path / "x.gguf").exists()
