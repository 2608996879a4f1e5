"""The benchmark's machinery on a model so small that its figures mean nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from benchmarks import __main__ as standard
from benchmarks import apart, gpu, pairs, parts, record, sweeps, tables, training, trl_side, work

from .conftest import Here

_SMALL = ["--size=1", "--pairs=3", "--conversations=3", "--batch-size=3", "--repeats=1"]
# One packed row holds all records, so that its step is comparable, too.
_BATCHES = ["--plain-batches", "1", "8", "--trl-batches", "3", "--trl-packed", "512"]


def _rows(table: str) -> dict[str, list[str]]:
    """The cells of a page's tables by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in lines}


# transformers has renamed what TRL sets by default.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_every_side_of_both_stages_does_the_same_mathematics(
    files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`take_turns` ends the run unless first steps agree, so that pages there are prove it."""
    few = ["--default-pairs=2", "--default-conversations=2", "--save"]
    pages = training.main([*files, *_SMALL, *_BATCHES, *few], apart=Here)
    printed = capsys.readouterr().out
    for stage, sides_of_stage in {
        "dpo": [
            "tandem", "plain loop, 1 at a time", "plain loop, 8 pairs padded",
            "TRL, 3 pairs padded", "tandem, second run", "TRL, its defaults",
        ],
        "sft": [
            "tandem", "plain loop, 1 at a time", "plain loop, 8 conversations padded",
            "TRL, 3 conversations padded", "TRL, packed to 512 tokens", "TRL, its defaults",
        ],
    }.items():  # fmt: skip
        table = pages[stage]
        assert table in printed
        kept = record.load(tmp_path / "results" / f"training-{stage}-1m.json")
        assert list(kept.settings["sides"]) == sides_of_stage
        for name in sides_of_stage:
            (one,) = kept.measured[name]
            assert one.first_records == (2 if name == "TRL, its defaults" else 3)
            assert one.records == one.first_records
            assert one.bfloat16 == (name == "TRL, its defaults")
        assert {*sides_of_stage, "TRL, its defaults", "plain loop, 8 padded"} <= set(_rows(table))
        assert "alone: TRL, its defaults: 2." in table
        assert "Roofline: " in table
        assert "(2.0 G/s, by oneDNN" in table
        assert f"torch {torch.__version__}" in table
        assert tables.markdown(kept) == table
        assert (tmp_path / "results" / f"training-{stage}-1m.svg").read_text().startswith("<svg")
    assert "0 reference log-probs computed" in pages["dpo"]
    losses = record.load(tmp_path / "results" / "training-sft-1m.json").measured
    assert len({round(ones[0].first_loss, 4) for ones in losses.values()}) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trls_defaults_are_trls_own(tmp_path: Path) -> None:
    task = work.Work("trl-default", "dpo", "", "", str(tmp_path), 16, 1)
    for config in (trl.DPOConfig, trl.SFTConfig):
        found = config(**trl_side._arguments(task))
        assert found.bf16
        assert found.gradient_checkpointing
        assert found.per_device_train_batch_size == work.PADDED
        assert found.gradient_accumulation_steps == 1
    assert not trl.DPOConfig(**trl_side._arguments(task)).precompute_ref_log_probs
    best = trl.DPOConfig(**trl_side._arguments(replace(task, side="trl", size=2)))
    assert (best.bf16, best.gradient_checkpointing) == (False, False)
    assert best.gradient_accumulation_steps == 8


def test_a_first_step_that_differs_ends_the_run() -> None:
    plain = work.Measured(1, 1, 2, 0.693147, -2.0, logps=(-1.9, -2.0))
    ours = work.Measured(1, 1, 1, 0.693147, -1.9)
    record.check({"plain loop": [plain], "tandem": [ours]}, "dpo")
    for other, said in (
        (replace(ours, first_logp=-1.9001), "mean log-prob is -1.9001, in the plain loop -1.9"),
        (replace(ours, first_loss=0.7), "first step's loss is 0.7, not 0.693"),
    ):
        with pytest.raises(apart.SideError, match=f"tandem: .*{said}"):
            # Whichever comes first, the other is the one that is looked at.
            record.check({"tandem": [other], "plain loop": [plain]}, "dpo")
    record.check({"plain": [plain], "x": [replace(ours, first_logp=-1.901, bfloat16=True)]}, "dpo")
    with pytest.raises(apart.SideError, match=r"loss is 2\.1, not 2\.0"):
        record.check({"plain loop": [replace(plain, first_loss=2.1)]}, "sft")


class _Interrupted(Here):
    """Ends the run at its third measurement."""

    def measure(self, task: work.Work) -> work.Measured:
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        return super().measure(task)


def test_an_interrupted_run_is_resumed(files: list[str], tmp_path: Path) -> None:
    options = [*files, *_SMALL, "--stage=dpo", "--sides", "tandem", "plain", "--repeats=2"]
    options += ["--plain-batches", "1"]
    benches: list[Here] = []

    def made(kind: type[Here]) -> Callable[[int], Any]:
        def make(threads: int) -> Here:
            benches.append(kind(threads))
            return benches[-1]

        return make

    with pytest.raises(KeyboardInterrupt):
        training.main([*options, "--save"], apart=made(_Interrupted))
    file = tmp_path / "results" / "training-dpo-1m.json"
    before = record.load(file)
    assert {name: len(ones) for name, ones in before.measured.items()} == {
        "tandem": 1, "plain loop, 1 at a time": 1
    }  # fmt: skip
    training.main([*options, "--resume"], apart=made(Here))
    after = record.load(file)
    assert sorted(benches[-1].asked) == ["plain loop, 1 at a time", "tandem"]
    for name, ones in after.measured.items():
        assert len(ones) == 2
        assert ones[0] == before.measured[name][0]
    training.main([*options, "--resume"], apart=made(Here))
    assert benches[-1].asked == []
    with pytest.raises(SystemExit, match="begun with other settings"):
        training.main([*options, "--resume", "--repeats=3"], apart=made(Here))


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
    measured = apart.Apart(1).measure(task)
    assert (measured.records, measured.first_records) == (3, 2)
    assert min(measured.loop_seconds, measured.reference_seconds) > 0
    assert 2**26 < measured.peak_bytes < 2**33
    broken = replace(task, data=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(apart.SideError, match=r"[\s\S]*nowhere\.jsonl"):
        apart.Apart(1).measure(broken)


def test_missing_data_is_said(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl is not here"):
        training.main([*files, f"--pairs-file={tmp_path / 'nowhere.jsonl'}"], apart=Here)
    with pytest.raises(SystemExit, match="has only 3 records, 9 were asked for"):
        training.main([*files, "--size=1", "--pairs=9", "--stage=dpo"], apart=Here)
    with pytest.raises(SystemExit, match="leaves nothing to measure"):
        training.main([*files, *_SMALL, "--stage=sft", "--sides", "again"], apart=Here)


def _record(stage: str, sides: dict[str, tuple[str, int, list[work.Measured]]]) -> record.Record:
    return record.Record(
        settings={
            "stage": stage, "model": "60M parameters", "dtype": "float32", "batch_size": 4,
            "records": 4, "tokens": 400, "command": "x",
            "sides": {
                name: {"side": side, "size": size, "records": 0, "repeats": len(ones)}
                for name, (side, size, ones) in sides.items()
            },
        },
        environment=record.Environment("a processor", 2, "versions"),
        rates=[{"torch.mm": 100.0, "oneDNN": 50.0}, {"torch.mm": 80.0, "oneDNN": 90.0}],
        measured={name: ones for name, (_, _, ones) in sides.items()},
    )  # fmt: skip


def _took(loop: float, reference: float, peak: int = 10, **other: Any) -> work.Measured:
    values = {"records": 4, "tokens": 400, "peak_bytes": peak, **other}
    return work.Measured(loop, reference, 4, 0.69, -1.0, **values)


def test_rungs_and_shares_by_hand() -> None:
    kept = _record(
        "dpo",
        {
            "tandem": ("tandem", 0, [_took(2, 1), _took(4, 1), _took(3, 1)]),
            "plain loop, 1 at a time": ("plain", 1, [_took(8, 4, 20)]),
            # Faster in the loop, slower with the reference.
            "plain loop, 8 pairs padded": ("plain", 8, [_took(6, 10, 40)]),
            # Half of the records, of twice their mean length.
            "TRL, its defaults": (
                "trl-default", 0, [_took(40, 0, 20, records=1, tokens=200, live_reference=True)]
            ),
        },
    )  # fmt: skip
    kept.rates.append({"torch.mm": 60.0})
    found = {one.rung: one for one in tables.comparisons(kept)}
    assert found["plain"].label == "plain loop at its best (1 at a time)"
    # A rung's best in the loop may be another of its sides.
    assert found["plain"].included == pytest.approx(12 / 4)
    assert found["plain"].loop == pytest.approx(6 / 3)
    assert found["plain"].memory == 10 / 20
    assert found["padded"].included == pytest.approx(16 / 4)
    assert found["default"].included == pytest.approx(2 * 40 / 4)
    assert found["default"].loop is None
    whole, nearest = tables.roofline_share(kept, lambda one: one.seconds, 200.0)
    assert whole == pytest.approx(200 / 4 / 100)  # the median's time, the run's best rate
    assert nearest == pytest.approx(200 / 3 / 100)  # of 200/3/100, 200/5/90 and 200/4/60
    assert set(found) == {"plain", "padded", "default"}


def test_the_readmes_table_is_made_of_the_results(tmp_path: Path) -> None:
    assert tables.readme_table(tmp_path) is None
    plain = ("plain", 1, [_took(8, 4, 20)])
    _record("dpo", {"tandem": ("tandem", 0, [_took(3, 1)]), "plain loop, 1 at a time": plain}).save(
        tmp_path / "training-dpo-60m.json"
    )
    assert tables.readme_table(tmp_path) is None
    sft = {"tandem": ("tandem", 0, [_took(3, 0)]), "plain loop, 1 at a time": plain}
    _record("sft", sft).save(tmp_path / "training-sft-60m.json")
    table = tables.readme_table(tmp_path)
    assert table is not None
    assert re.findall(r"[\d.]+x", table) == ["3.0x", "2.7x", "0.50x", "4.0x"]


def test_the_standard_set_is_understood(
    files: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, list[str]]] = []
    for module in (training, parts, pairs, sweeps, gpu):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "main", lambda words, name=name: asked.append((name, words)))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--resume"])
    standard.main()
    assert [name for name, _ in asked] == ["training"] * 3 + ["parts", "pairs", "sweeps", "gpu"]
    sizes = []
    for name, words in asked:
        module = {
            "training": training, "parts": parts, "pairs": pairs, "sweeps": sweeps, "gpu": gpu,
        }[name]  # fmt: skip
        options = module._parse(words)
        assert options.save if name in ("parts", "pairs") else options.resume
        if name == "training":
            sizes.append(options.size)
            base = work.Work("tandem", "sft", "", str(tmp_path / "talks.jsonl"), "", 3, 1)
            names = [task.work.name for task in training._tasks(options, base)]
            assert names[:2] == ["tandem", "plain loop, 1 at a time"]
    assert sizes == [60, 10, 150]


def test_slow_sides_may_have_fewer_repeats(files: list[str], tmp_path: Path) -> None:
    options = training._parse(["--slow-repeats=1", "--plain-batches", "1", "8"])
    base = work.Work("tandem", "dpo", "", str(tmp_path / "pairs.jsonl"), "", 3, 1)
    repeats = {task.work.name: task.repeats for task in training._tasks(options, base)}
    assert repeats == {
        "tandem": 3, "plain loop, 1 at a time": 3, "plain loop, 8 pairs padded": 1,
        "TRL, 1 at a time": 3, "TRL, 2 pairs padded": 1, "tandem, second run": 1,
        "TRL, its defaults": 1,
    }  # fmt: skip
