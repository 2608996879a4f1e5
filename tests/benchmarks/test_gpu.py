"""The GPU part where no GPU is: the same code on CPU, and a page that says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import apart, gpu, record, tables, work

from .conftest import Here


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute here; tests/stages/test_compiled.py is about it."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_without_cuda_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert gpu.main([]) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "not measured" in said
    assert gpu.COMMAND in said


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_dry_run_takes_the_same_way(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    options = [*files, "--dry-run", "--pairs=2", "--conversations=2", "--batch-size=2", "--save"]
    text = gpu.main([*options, f"--scratch={tmp_path}"], apart=Here)
    assert text is not None
    assert text == (tmp_path / "results" / "gpu-dry-run.md").read_text()
    assert "figures mean nothing" in text.splitlines()[0]
    # Liger and Unsloth alone may be missing.
    lines = [line for line in text.splitlines() if "not measured" in line]
    assert all("Liger" in line or "Unsloth" in line for line in lines)
    for stage, count in (("dpo", 8), ("sft", 8)):
        kept = record.load(tmp_path / "results" / f"gpu-{stage}-dry-run.json")
        assert len([ones for ones in kept.measured.values() if ones]) >= count
    assert not list((tmp_path / "results").glob("*-7b*"))
    written = (tmp_path / "model-1m" / "config.json").stat().st_mtime_ns
    gpu.main([*options[:-1], "--resume", f"--scratch={tmp_path}"], apart=Here)
    assert (tmp_path / "model-1m" / "config.json").stat().st_mtime_ns == written


def test_the_smoke_run_has_tandem_alone(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    options = [*files, "--smoke", "--dry-run", "--pairs=2", "--conversations=2", "--save"]
    assert gpu.main([*options, f"--scratch={tmp_path}"], apart=Here) is not None
    for stage in gpu.STAGES:
        kept = record.load(tmp_path / "results" / f"gpu-{stage}-smoke-dry-run.json")
        assert not kept.failed
        assert {name: len(ones) for name, ones in kept.measured.items()} == {
            "tandem": 1, "tandem, base in 4 bits": 1, "tandem, compiled": 1,
        }  # fmt: skip
    assert not list((tmp_path / "results").glob("*-7b*"))


def test_the_page_is_that_of_its_measurements(tmp_path: Path) -> None:
    for file in tables.RESULTS.glob("gpu-*-7b.json"):
        (tmp_path / file.name).write_text(file.read_text())
    gpu.write(tmp_path)
    page = (tables.RESULTS / "gpu-7b.md").read_text()
    assert page == (tmp_path / "gpu-7b.md").read_text()
    assert gpu.COMMAND in page
    if not list(tmp_path.glob("*.json")):
        assert page.count("not measured") == 38


class _Short(Here):
    """A GPU with room for tandem alone, and a peer that does not start."""

    def measure(self, task: work.Work) -> work.Measured:
        self.asked.append(task.name)
        if task.side == "plain":
            raise apart.SideError("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried")
        if task.side == "unsloth":
            raise apart.SideError("Traceback\nImportError: no such thing\n")
        return work.Measured(
            1, 1, 2, 0.693, -2, bfloat16=True, records=2, tokens=20, peak_bytes=2**30
        )


def test_a_side_that_fails_on_cuda_is_noted_and_left_out(tmp_path: Path) -> None:
    base = work.Work("tandem", "dpo", "", "", "", 2, 1, device="cuda")
    works = [base] + [
        work.Work(**base.as_dict() | {"side": side, "size": 2}) for side in ("plain", "unsloth")
    ]
    sides = {w.name: {"side": w.side, "size": 2, "records": 0, "repeats": 2} for w in works}
    settings = {"stage": "dpo", "records": 2, "tokens": 20, "model": "x", "dtype": "bfloat16"}
    kept = record.Record(
        settings | {"batch_size": 2, "command": "x", "sides": sides},
        record.Environment("a GPU", 1, "versions"),
    )
    bench = _Short(1, "cuda")
    record.take_turns(bench, [record.Task(w, 2) for w in works], kept, tmp_path, None)
    assert (
        sorted(bench.asked)
        == ["Unsloth, 2 pairs padded", "plain loop, 2 pairs padded"] + ["tandem"] * 2
    )
    table = tables.markdown(kept)
    assert "| plain loop, 2 pairs padded | out of memory |" in table
    assert "| Unsloth, 2 pairs padded | ImportError: no such thing |" in table

    on_cpu = [record.Task(work.Work(**w.as_dict() | {"device": "cpu"}), 1) for w in works]
    fresh = record.Record(kept.settings, kept.environment)
    with pytest.raises(SystemExit, match="plain loop, 2 pairs padded failed:"):
        record.take_turns(_Short(1), on_cpu, fresh, tmp_path, None)
