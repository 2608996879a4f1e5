"""The loss of each data set: exact however the work is packed, and nothing else changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import ValidationSettings
from tandem.stages.training.training_data import names_of
from tandem.storage.atomic_files import read_jsonl
from tandem.train.objectives.by_data_set import LossByDataSet

from .made_inputs import make_conversations, make_pairs
from .test_training_stages import run
from .test_validation import same

# All 20 records in the first step, so that it knows each set before anything is trained.
WHOLE: dict[str, Any] = {"batch_size": 40, "max_steps": 2, "logging_steps": 1}


def two(kind: str, folder: Path) -> tuple[DataSource, DataSource]:
    """Two data sets of a kind, whose files have one name."""
    made = []
    for name, count in (("short", 7), ("long", 13)):
        path = folder / name / f"{kind}.jsonl"
        path.parent.mkdir(exist_ok=True)
        (make_conversations if kind == "sft" else make_pairs)(path, count)
        made.append(DataSource(path=str(path)))
    lines = Path(made[1].path).read_text().splitlines(keepends=True)
    Path(made[1].path).write_text("".join(lines[6:]))  # 7 of them, and other ones
    return made[0], made[1]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_each_data_set_has_the_loss_that_it_has_alone(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    sources = two(kind, tmp_path)
    loss = {"loss": "simpo"} if kind == "dpo" else {}
    both = {**WHOLE, **loss, "data": sources, "validation": ValidationSettings(data=sources)}
    # Of one record a micro-batch, so that sums of both sets stand beside each other.
    run(kind, tiny_model, tmp_path / "both", budget=1, **both)
    run(kind, tiny_model, tmp_path / "packed", budget=4096, **both)
    first, second = read_jsonl(tmp_path / "both" / "metrics.jsonl")
    scores = read_jsonl(tmp_path / "both" / "validation.jsonl")
    names = [f"{folder}/{kind}.jsonl" for folder in ("short", "long")]
    counts = []
    for name, source in zip(names, sources, strict=True):
        alone = tmp_path / name.partition("/")[0] / "alone"
        settings = both | {"data": (source,), "validation": ValidationSettings(data=(source,))}
        run(kind, tiny_model, alone, **(settings | {"max_steps": 1}))
        (own,) = read_jsonl(alone / "metrics.jsonl")
        assert first[f"loss_of/{name}"] == pytest.approx(own["loss"], rel=1e-6)
        own_score = read_jsonl(alone / "validation.jsonl")[0]
        assert scores[0][f"eval_loss_of/{name}"] == pytest.approx(own_score["eval_loss"], rel=1e-6)
        assert not [key for key in own if key.startswith("loss_of")]
        assert first[f"loss_of/{name}"] != pytest.approx(second[f"loss_of/{name}"], rel=1e-3)
        counts.append(first["loss"] - first[f"loss_of/{name}"])
    assert counts[0] * counts[1] < 0  # the loss of all lies between the two
    packed = read_jsonl(tmp_path / "packed" / "metrics.jsonl")
    for line, like in zip([first, second], packed, strict=True):
        for name in names:
            assert line[f"loss_of/{name}"] == pytest.approx(like[f"loss_of/{name}"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "more"), [("sft", {}), ("dpo", {"loss": "kto"}), ("dpo", {"loss": "aot"})]
)
def test_training_does_not_depend_on_it(
    kind: str, more: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data": two(kind, tmp_path), "max_steps": 3, "logging_steps": 1, **more}
    told = run(kind, tiny_model, tmp_path / "told", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("tandem.stages.training.trainer_setup.by_data_set", lambda one, _: one)
        plain = run(kind, tiny_model, tmp_path / "plain", **settings)
    assert same(told, plain)
    lines, like = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("told", "plain"))
    for line, plainer in zip(lines, like, strict=True):
        assert line["loss"] == plainer["loss"]
        assert sum(key.startswith("loss_of/") for key in line) == 2


def test_a_set_without_records_in_a_line_is_not_in_it() -> None:
    class Tokens:
        couples = False

        def begin(self, *_: Any) -> int:
            return 6

        def shares(self) -> Any:
            return [2, 2, 2]

        def loss(self, logps: Any, weights: Any, members: Any, *, first_step: bool) -> Any:
            from tandem.train.objectives.objective import LossSums

            return LossSums(logps.sum(), {"loss": logps.sum()}, logps, [1] * len(members))

        def metrics(self, sums: dict[str, float]) -> dict[str, float]:
            return {"loss": sums["loss"] / sums["count"]}

    objective = LossByDataSet(Tokens(), {"a": 3, "b": 1, "none": 0, "c": 5})  # type: ignore[arg-type]
    objective.begin([None] * 3, [8, 2, 0])  # type: ignore[list-item]
    each = torch.tensor([5.0, 1.0, 3.0, 0.0], dtype=torch.float64)  # the last is padding
    sums = objective.loss(each, each, [0, 1, 2], first_step=False).sums
    found = objective.metrics({"count": 6.0} | {name: float(v) for name, v in sums.items()})
    assert found == {"loss": 1.5, "loss_of/a": 1.0, "loss_of/c": 2.5}


def test_names_tell_the_sets_apart() -> None:
    def of(*sources: tuple[str, str]) -> list[str]:
        return names_of([DataSource(path=path, split=split) for path, split in sources])

    assert of(("a/x.jsonl", "train"), ("b/y.jsonl", "train")) == ["x.jsonl", "y.jsonl"]
    assert of(("a/x.jsonl", "train"), ("b/x.jsonl", "train")) == ["a/x.jsonl", "b/x.jsonl"]
    assert of(("hub/x", "train"), ("hub/x", "more"), ("hub/y", "train")) == [
        "x:train", "x:more", "y",
    ]  # fmt: skip
    assert of(("a/x", "train"), ("a/x", "train")) == ["x:train:1", "x:train:2"]
