"""The counts of a plan are those that a real run reports, on real records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.batching.packing import padded_tokens
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.integrations.choose import choose_device
from tandem.model.base_model import load_base_info
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.plan.stage_estimate import StageSetup
from tandem.plan.workload import Pacing, Workload, count_work, guess_work
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings, ValidationSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.stages.training.training_data import StageReader
from tandem.storage.atomic_files import read_json
from tests.jobs import run_settings, training_job

from ..stages.made_inputs import QUIET

RECORDS, BATCH_SIZE = 12, 3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _first_lines(source: Path, count: int, target: Path) -> Path:
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(line for line, _ in zip(lines, range(count), strict=False)))
    return target


def _settings(
    kind: str, shared_data: Path, folder: Path, **changes: Any
) -> SftSettings | DpoSettings:
    source = {
        "sft": shared_data / "conversations" / "slimorca_format.jsonl",
        "dpo": shared_data / "pairs" / "orca_dpo_pairs.jsonl",
    }[kind]
    data = _first_lines(source, RECORDS, folder / f"{kind}.jsonl")
    values: dict[str, Any] = {
        "data": (DataSource(path=str(data)),),
        "batch_size": BATCH_SIZE,
        "epochs": 1.5,
        "learning_rate": 1e-3,
        "max_length": 192,
        "lora": LoraSettings(rank=2, alpha=4),
    } | changes
    return SftSettings(**values) if kind == "sft" else DpoSettings(**values)


def _reader(settings: SftSettings | DpoSettings, chat: ChatTokenizer) -> StageReader:
    sft = isinstance(settings, SftSettings)
    name, kind = ("sft", "conversations") if sft else ("dpo", "preference pairs")
    return StageReader(name, kind, settings, chat, None, QUIET)


def _counted(
    kind: str, model: Path, settings: SftSettings | DpoSettings, *, padded: bool = False
) -> Workload:
    base = load_base_info(run_settings("", Path()), model, settings.max_length, weights=False)
    config, reader = base.config, _reader(settings, base.chat)
    records = reader.read(
        [DataSource(path=source.path, weight=source.weight) for source in settings.data], [], 3
    )
    setup = _setup(settings, config, processes=1, budget=1024, padded=padded)
    return count_work(records.dataset, setup.pacing(records.parts))


def _setup(settings: SftSettings | DpoSettings, config: Any, **others: Any) -> StageSetup:
    return StageSetup(
        name="dpo", settings=settings, device=choose_device("cpu", "float32"), engine="ddp",
        config=config, seed=3, quantized=False, baseline=0, **others,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "attention", "mixed"),
    [
        ("sft", "auto", False),
        ("sft", "auto", True),
        ("dpo", "auto", False),
        ("dpo", "padded", True),
    ],
)
def test_a_plan_counts_what_a_run_reports(
    kind: str, attention: str, mixed: bool, stories_path: Path, shared_data: Path, tmp_path: Path
) -> None:
    settings: Any = _settings(kind, shared_data, tmp_path)
    if mixed:
        (source,) = settings.data
        twice = source.model_copy(update={"weight": 1.5})
        held_out = ValidationSettings(fraction=0.2)
        settings = settings.model_copy(update={"data": (source, twice), "validation": held_out})
    stage: Any = run_sft if kind == "sft" else run_dpo
    job = training_job(
        settings,
        stories_path,
        tmp_path / "out",
        seed=3,
        attention=attention,
        tokens_per_microbatch=1024,
    )
    folder = stage(job, QUIET, default_callbacks(job.run))
    summary = read_json(folder / "summary.json")
    work = _counted(kind, stories_path, settings, padded=attention == "padded")
    for name in ("steps", "examples", "tokens", "padded_tokens", "shared_tokens", "micro_batches"):
        assert getattr(work, name) == summary[name], name
    assert work.fill == pytest.approx(summary["fill"], rel=1e-12)
    assert work.imbalance == pytest.approx(summary["imbalance"], rel=1e-12)
    assert work.packed_steps == work.steps > 5
    assert work.shared_tokens > 0 or kind == "sft" or attention == "padded"
    # And the run itself has put both beside each other.
    compared = summary["estimate"]
    for name in ("tokens", "steps"):
        assert compared[name] == {"estimated": summary[name], "actual": summary[name]}
    assert compared["seconds"]["actual"] == summary["train_seconds"]


def test_a_plan_for_processes_deals_as_they_do(
    stories_path: Path, shared_data: Path, tmp_path: Path
) -> None:
    """Against dealing every step's trees, one by one."""
    from tandem.data.batching.packing import example_cost, plan_step
    from tandem.data.batching.sampler import StepSampler
    from tandem.train.token_budget import attention_weight

    settings = _settings("dpo", shared_data, tmp_path)
    base = load_base_info(run_settings("", Path()), stories_path, settings.max_length)
    config, reader = base.config, _reader(settings, base.chat)
    _, trees = reader.encode([DataSource(path=settings.data[0].path)])
    setup = _setup(settings, config, processes=3, budget=900, padded=False)
    work = count_work(trees, setup.pacing())
    weight = attention_weight(config)
    plans = []
    for step in StepSampler(len(trees), BATCH_SIZE, seed=3).steps(0, work.steps):
        own = [trees[i] for i in step.examples]
        costs = [example_cost(tree, weight) for tree in own]
        plans.append(plan_step([tree.fed for tree in own], costs, 900, 3))
    assert work.micro_batches == sum(len(rank) for plan in plans for rank in plan.ranks)
    assert work.imbalance == pytest.approx(np.mean([plan.imbalance for plan in plans]), rel=1e-12)
    assert work.imbalance > 1
    assert work.fill == pytest.approx(np.mean([plan.fill for plan in plans]), rel=1e-12)
    assert work.reference_visible == pytest.approx(sum(map(_visible, trees)), rel=1e-12)
    assert work.longest == max(tree.fed for tree in trees)


def _visible(tree: Example) -> int:
    """Pairs that see each other, row by row."""
    prefix = len(tree.prefix.input_ids)
    return sum(range(1, prefix + 1)) + sum(
        prefix + row for branch in tree.branches for row in range(1, branch.fed + 1)
    )


def test_many_steps_are_packed_in_part(
    stories_path: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings("sft", shared_data, tmp_path, batch_size=2, epochs=4)
    whole = _counted("sft", stories_path, settings)
    monkeypatch.setattr("tandem.plan.workload._PACKED", 7)
    part = _counted("sft", stories_path, settings)
    assert part.packed_steps < whole.packed_steps == whole.steps
    assert (part.tokens, part.padded_tokens) == (whole.tokens, whole.padded_tokens)
    assert part.micro_batches == pytest.approx(whole.micro_batches, rel=0.2)
    assert part.fill == pytest.approx(whole.fill, rel=0.2)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 21])
def test_padded_batches_of_eight(count: int) -> None:
    lengths = [(7 * i) % 13 + 1 for i in range(count)]
    batches = [lengths[i : i + 8] for i in range(0, count, 8)]
    assert padded_tokens(lengths) == sum(max(batch) * len(batch) for batch in batches)


def test_guessed_records_count_as_equal_ones_would() -> None:
    """Against records of that many tokens, six of ten trained."""
    from tandem.data.encoded.dataset import to_arrays
    from tandem.data.encoded.dataset_store import DatasetWriter
    from tandem.data.encoded.encode_chunk import EncodedChunk

    length, count = 11, 10
    ids = np.arange(length, dtype=np.int32)
    trained = np.arange(length) > 4
    nothing = Branch(ids[:0], trained[:0])
    trees = [Example(nothing, (Branch(ids, trained),), Origin("x", i + 1)) for i in range(count)]
    writer = DatasetWriter(None, ["x"])
    writer.add(EncodedChunk("x", to_arrays(trees), ()))
    writer.finish({}, [count])
    pacing = Pacing(4, 1.5, None, 0, 20, 1, 0.0)
    real, guessed = count_work(writer.dataset(), pacing), guess_work(10, 10, pacing, answers=0.6)
    # A record's last target is not fed: eleven tokens feed ten.
    names = "records steps examples tokens tokens_per_epoch targets visible longest largest"
    for name in (*names.split(), "reference_tokens", "reference_visible"):
        assert getattr(guessed, name) == getattr(real, name), name
    # An epoch's last step is guessed as large as the others.
    assert (guessed.micro_batches, real.micro_batches) == (10, 9)
