"""`tandem eval`: several models, adapters among them, in one table; nothing is measured twice."""

from __future__ import annotations

import io
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.evaluate.eval_model import find_eval_model
from tandem.evaluate.evaluate_models import evaluate_models
from tandem.evaluate.harness import Harness
from tandem.evaluate.scores import MeasurementStore
from tandem.evaluate.win_rates import Judge, Messages
from tandem.recipe.data_source import DataSource
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.report.terminal_tables import comparison_notes
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import evaluation_job

from .made_adapters import make_adapter
from .test_judge import one_by_one

pytest.importorskip("lm_eval")


def evaluate(
    models: dict[str, str],
    folder: Path,
    settings: EvaluationSettings,
    judge: Any = None,
    **changes: Any,
) -> Any:
    said = io.StringIO()
    found = evaluate_models(
        evaluation_job(
            settings,
            models,
            folder,
            chat_template="neural-chat",
            seed=0,
            **changes,
        ),
        Console(file=said, width=200),
        judge,
    )
    return found, said.getvalue()


def questions(path: Path, count: int = 4) -> Path:
    rows = (
        {"question": f"What is {i} and one?", "answer": f"It is {i + 1}.", "accepted": [str(i + 1)]}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def adapter(stories_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(stories_path, tmp_path_factory.mktemp("adapter") / "tuned")


@pytest.fixture(scope="module")
def settings(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    heldout = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    with (shared_data / "conversations" / "slimorca_format.jsonl").open() as file:
        heldout.write_text("".join(line for line, _ in zip(file, range(20), strict=False)))
    return EvaluationSettings(
        tasks=("arc_easy", "winogrande"),
        task_data=str(shared_data / "evaluation"),
        num_fewshot=1,
        limit=6,
        pairs=(DataSource(path=str(shared_data / "pairs" / "orca_dpo_pairs.jsonl")),),
        heldout=(DataSource(path=str(heldout)),),
    )


@pytest.fixture(scope="module")
def evaluated(
    stories_path: Path,
    adapter: Path,
    settings: EvaluationSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, str, Path]:
    folder = tmp_path_factory.mktemp("run") / "evaluation"
    found, said = evaluate({"stories": str(stories_path), "tuned": str(adapter)}, folder, settings)
    return found, said, folder


def kept(folder: Path, name: str) -> list[Any]:
    return [read_json(path)["result"] for path in sorted((folder / "scores").glob(f"{name}-*"))]


def test_differences_are_paired(evaluated: tuple[Any, str, Path]) -> None:
    found, _, folder = evaluated
    assert list(found["models"]) == ["stories", "tuned"]
    tuned = found["models"]["tuned"]
    files = kept(folder, "own")
    assert len(files) == 2
    values = [f["scores"]["preference_margin"]["values"] for f in files]
    means = {f["scores"]["preference_margin"]["values"][0]: statistics.mean(v)
             for f, v in zip(files, values, strict=True)}  # fmt: skip
    assert sorted(means.values()) == pytest.approx(
        sorted(m["preference_margin"] for m in found["models"].values())
    )
    gap, error = tuned["differences"]["preference_margin"]["first"]
    one = next(v for v in values if statistics.mean(v) == pytest.approx(tuned["preference_margin"]))
    other = next(v for v in values if v is not one)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert gap == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(6))
    assert tuned["differences"]["preference_margin"]["previous"] == [gap, error]


def test_an_adapter_is_measured_on_its_base_with_its_own_template(
    evaluated: tuple[Any, str, Path], stories_path: Path, adapter: Path
) -> None:
    found, _, _ = evaluated
    assert found["models"]["tuned"]["heldout_loss"] != found["models"]["stories"]["heldout_loss"]
    tuned = find_eval_model("tuned", str(adapter))
    base = find_eval_model("base", str(stories_path))
    assert (tuned.folder, tuned.adapter) == (stories_path, adapter)
    assert "<|assistant|>" in tuned.tokenizer("neural-chat")[1].source
    assert "### User" in base.tokenizer("neural-chat")[1].source


def test_an_adapter_of_other_weights_is_refused(
    stories_path: Path, adapter: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    manifest = {
        "stage": "sft", "status": "finished", "inputs": {"model": {"weights": "0" * 64}},
        "schedule": {}, "outputs": {}, "started_at": "",
    }  # fmt: skip
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was trained on other weights"):
        find_eval_model("moved", str(moved))
    (moved / "manifest.json").unlink()
    config = read_json(moved / "adapter_config.json")
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is an adapter of .*gone, and that folder is gone"):
        find_eval_model("moved", str(moved))


def test_what_is_finished_is_not_measured_again(
    stories_path: Path,
    settings: EvaluationSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[str] = []
    real = Harness.measure

    def measure(self: Harness, plan: Any, **options: Any) -> Any:
        if plan.name == "winogrande" and not measured.count("killed"):
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(plan.name)
        return real(self, plan, **options)

    monkeypatch.setattr(Harness, "measure", measure)
    tasks = settings.model_copy(update={"pairs": (), "heldout": ()})
    models = {"stories": str(stories_path)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, tmp_path / "e", tasks)
    assert measured == ["arc_easy", "killed"]
    found, said = evaluate(models, tmp_path / "e", tasks)
    assert measured == ["arc_easy", "killed", "winogrande"]
    assert "arc_easy" in said.lower() or "ARC-easy was measured before" in said
    # Finished, with the same inputs; then more tasks in the same folder, which use what is there.
    assert evaluate(models, tmp_path / "e", tasks)[0] == found
    more = tasks.model_copy(update={"tasks": ("winogrande", "arc_challenge"), "limit": 6})
    with pytest.raises(UserError, match="holds a finished evaluate stage with other inputs"):
        evaluate(models, tmp_path / "e", more)
    evaluate(models, tmp_path / "e", more, replace=True)
    assert measured == ["arc_easy", "killed", "winogrande", "arc_challenge"]
    # Another limit is another measurement.
    fewer = more.model_copy(update={"tasks": ("winogrande",), "limit": 2})
    evaluate(models, tmp_path / "e", fewer, replace=True)
    assert measured[-1] == "winogrande"
    assert len(measured) == 5


def test_a_damaged_measurement_counts_as_none(tmp_path: Path) -> None:
    kept = MeasurementStore(tmp_path)
    key = {"task": "a", "limit": None, "sizes": (1, 2)}
    assert kept.find("a/b c", key) is None
    kept.keep("a/b c", key, {"value": 0.5})
    assert kept.find("a/b c", key) == {"value": 0.5}
    assert kept.find("a/b c", {**key, "limit": 3}) is None
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:40])
    assert kept.find("a/b c", key) is None


def run_cli(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["eval", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command(
    stories_path: Path,
    adapter: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    asked = questions(tmp_path / "q.jsonl")
    out = tmp_path / "out"
    argv = [
        str(stories_path), str(adapter), "--questions", str(asked), "--max_new_tokens", "4",
        "--tasks", "arc_challenge,arc_easy", "--data", str(shared_data / "evaluation"),
        "--limit", "2", "--num-fewshot", "1", "--device", "cpu", "--samples", "1",
        "--output_dir", str(out),
    ]  # fmt: skip
    code, table, notices = run_cli(capsys, *argv)
    assert code == 0, notices
    for expected in (
        "stories260K", "tuned", "ARC-challenge", "ARC-easy", "answer accuracy",
        "acc_norm, 1-shot, 2 items", "not comparable with the",
        "What is 0 and one?", "evaluation.json",
    ):  # fmt: skip
        assert expected in table, expected
    assert "Warning" not in table + notices
    # The same again: nothing to do; as JSON, the same figures.
    code, printed, _ = run_cli(capsys, *argv, "--json")
    assert code == 0
    assert json.loads(printed) == read_json(out / "evaluation.json")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing to measure: name tasks (--tasks, --suite) or data of your own"),
        (["--tasks", "mmlu", "--data", "DATA"], "has no mmlu/test/SUBJECT_test.csv"),
        (["--tasks", "piqa", "--data", "DATA"], "piqa has no local form"),
        (["--suite", "leaderboard-v1", "--data", "gone"], "task data: gone is no folder"),
        (["--suite", "v9"], "invalid choice: 'v9'"),
        (["--limit", "0"], "it must be greater than 0"),
        (["--questions", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str],
    said: str,
    stories_path: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [str(shared_data / "evaluation") if f == "DATA" else f for f in flags]
    code, out, err = run_cli(capsys, str(stories_path), *flags)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("tandem ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "runs").exists()


def test_without_the_extra(
    stories_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import importlib.metadata

    real: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lm-eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    code, _, err = run_cli(
        capsys, str(stories_path), "--tasks", "gsm8k", "--output_dir", str(tmp_path / "o")
    )
    assert code == 2
    assert "pip install '.[eval]'" in err


def test_samples_of_answers(stories_path: Path, tmp_path: Path) -> None:
    asked = questions(tmp_path / "q.jsonl", count=6)
    only = EvaluationSettings(
        questions=(DataSource(path=str(asked)),), max_new_tokens=4, limit=4, samples=2
    )
    found, _ = evaluate({"m": str(stories_path)}, tmp_path / "e", only)
    assert found["counts"] == {"questions": 4, "pairs": 0}
    assert [s["prompt"] for s in found["samples"]] == ["What is 0 and one?", "What is 2 and one?"]
    assert len(read_jsonl(asked)) == 6


def test_what_lies_behind_the_limit_is_not_read(stories_path: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"Q {i}?", "answer": "A", "system": "", "chosen": "Yes.", "rejected": "No."}
        for i in range(600)
    ]
    talks = [
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}
        for _ in range(600)
    ]
    for some, name in ((rows, "rows"), (talks, "talks")):
        lines = [json.dumps(row) for row in some]
        lines[580] = "{"
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(lines))
    one = (DataSource(path=str(tmp_path / "rows.jsonl")),)
    only = EvaluationSettings(
        questions=one, pairs=one, heldout=(DataSource(path=str(tmp_path / "talks.jsonl")),),
        max_new_tokens=1, limit=3,
    )  # fmt: skip
    found, _ = evaluate({"m": str(stories_path)}, tmp_path / "e", only)
    assert found["counts"] == {"questions": 3, "pairs": 3, "conversations": 3}


def test_figures_of_another_dtype_are_others(stories_path: Path, tmp_path: Path) -> None:
    asked = questions(tmp_path / "q.jsonl")
    only = EvaluationSettings(questions=(DataSource(path=str(asked)),), max_new_tokens=4)
    models = {"m": str(stories_path)}

    def loss(dtype: str, **changes: Any) -> float:
        found, _ = evaluate(models, tmp_path / "e", only, dtype=dtype, **changes)
        return float(found["models"]["m"]["loss"])

    wide = loss("float32")
    assert loss("auto") == wide
    with pytest.raises(UserError, match="dtype: 'float32' -> 'bfloat16'"):
        loss("bfloat16")
    assert loss("bfloat16", replace=True) != wide
    assert loss("float32", replace=True) == wide


def test_a_judge_compares_with_the_first_model(
    stories_path: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = questions(tmp_path / "q.jsonl")
    only = EvaluationSettings(questions=(DataSource(path=str(asked)),), max_new_tokens=6)
    models = {"stories": str(stories_path), "tuned": str(adapter)}
    shown: list[str] = []

    def ask(messages: Messages) -> str:
        shown.append(messages[0]["content"])
        return "[[A]]" if len(shown) % 2 else "[[B]]"

    judge = Judge("wise", one_by_one(ask))
    found, _ = evaluate(models, tmp_path / "e", only, judge=judge)
    answers = found["samples"][0]["answers"]
    assert answers["stories"] in shown[0]
    assert answers["tuned"] in shown[0]
    # Its questions come in pairs of orders: mine first [[A]], mine second [[B]]: always mine.
    assert len(shown) == 8
    assert found["models"]["tuned"]["win_rate"] == 1.0
    assert "win_rate" not in found["models"]["stories"]
    assert found["judge"]["models"]["tuned"]["wins"] == 4
    assert found["judge"]["against"] == "stories"
    (note,) = (n for n in comparison_notes(found) if "wise" in n)
    assert note == (
        "wise on tuned against stories: 4 won, 0 tied, 0 lost; the same verdict in both orders "
        "100.0 %, for the answer shown first 50.0 %"
    )
    with pytest.raises(UserError, match="name questions, and two models or more"):
        evaluate({"stories": str(stories_path)}, tmp_path / "f", only, judge=judge)


def test_a_recipe_measures_its_models_by_one_line(
    stories_path: Path,
    shared_data: Path,
    settings: EvaluationSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run"
    recipe = {
        "name": "short", "model": str(stories_path), "output_dir": str(run), "device": "cpu",
        "chat_template": "neural-chat",
        "sft": {"data": settings.heldout[0].path, "max_steps": 2, "batch_size": 2,
                "max_length": 512},
        "evaluate": {"tasks": ["winogrande"], "task_data": str(shared_data / "evaluation"),
                     "num_fewshot": 1, "limit": 4},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "evaluate.tasks=[winograd]"]) == 2
    assert "winograd has no local form" in capsys.readouterr().err
    assert not run.exists()
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr()
    assert "acc, 1-shot, 4 items" in said.out
    found = read_json(run / "6-evaluation" / "evaluation.json")
    assert list(found["models"]) == ["base", "sft"]
    assert all("task:winogrande" in model for model in found["models"].values())
    assert "task:winogrande" in found["models"]["sft"]["differences"]
    page = (run / "report.html").read_text()
    assert "Winogrande" in page
    assert "few-shot examples are drawn from the evaluated file itself" in page


def test_right_answers_that_did_not_end_are_counted_apart(
    stories_path: Path, tmp_path: Path
) -> None:
    """A base model that was never taught to end says the right word, and goes on."""
    row = {"question": "Once upon a time", "answer": "said", "accepted": ["said"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    only = EvaluationSettings(
        questions=(DataSource(path=f"{tmp_path}/q.jsonl"),), max_new_tokens=24
    )
    found, _ = evaluate({"sft": str(stories_path)}, tmp_path / "e", only)
    figures = found["models"]["sft"]
    assert (figures["answer_accuracy"], figures["stop_rate"]) == (0.0, 0.0)
    assert figures["right_cut"] == 1.0
    assert found["warnings"] == [
        "SFT gives right answers that do not end: 1 of 1 answers have the right text and did not "
        "end by themselves, so that they do not count as right: the model talks on until "
        "max_new_tokens."
    ]
