"""Scores are the harness's own command line's, to the last digit; its terminal stays clean."""

from __future__ import annotations

import bz2
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tandem.data.tokenize.chat_template import resolve_template
from tandem.errors import UserError
from tandem.evaluate.harness import Harness, HarnessModel, TaskScores, task_scores_of
from tandem.evaluate.suites import NOT_COMPARABLE, Task, select_tasks, write_tasks
from tandem.model.model_folder import load_tokenizer
from tandem.storage.atomic_files import read_jsonl

from ..warm.python import python
from .made_adapters import make_adapter

pytest.importorskip("lm_eval")
SHARED_TASKS = ("arc_challenge", "hellaswag", "truthfulqa_mc2", "winogrande", "gsm8k")


@pytest.fixture(scope="module")
def chat_model(stories_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with a chat template in its folder."""
    folder = tmp_path_factory.mktemp("model") / "stories-chat"
    shutil.copytree(stories_path, folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    tokenizer = load_tokenizer(folder)
    resolve_template(tokenizer, "neural-chat")
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def task_data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first items of the real files: one of them alone has ten thousand."""
    folder = tmp_path_factory.mktemp("evaluation")
    for file in (shared_data / "evaluation").iterdir():
        compressed = file.suffix == ".bz2"
        content = bz2.decompress(file.read_bytes()) if compressed else file.read_bytes()
        if file.suffix != ".csv":  # lines, six of them an item of HellaSwag
            content = b"".join(content.splitlines(keepends=True)[: 6 * 60])
        (folder / file.name).write_bytes(bz2.compress(content) if compressed else content)
    return folder


@pytest.fixture(scope="module")
def task_folder(task_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for plan in select_tasks(SHARED_TASKS, None, task_data, 1).tasks:
        assert plan.data is not None
        write_tasks(plan.data, plan.harness_name, plan.shots, folder)
    return folder


def subject(model: Path, adapter: Path | None = None) -> HarnessModel:
    tokenizer = load_tokenizer(adapter or model)
    return HarnessModel(str(model), adapter, tokenizer, "float32", "cpu", "1")


def nothing(count: int, total: int | None) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One command line of the harness's, and where it writes."""

    names: tuple[str, ...]
    chat: bool
    asked: HarnessModel
    out: Path

    def plans(self, data: Path) -> tuple[Task, ...]:
        return select_tasks(self.names, None, data, 1).tasks

    def words(self, data: Path, include: Path) -> list[str]:
        model = f"pretrained={self.asked.pretrained},dtype=float32"
        if self.asked.adapter is not None:
            model += f",peft={self.asked.adapter},tokenizer={self.asked.adapter}"
        flags = ["--apply_chat_template", "--fewshot_as_multiturn", "true"] if self.chat else []
        tasks = ",".join(plan.harness_name for plan in self.plans(data))
        return [
            "lm_eval", "run", "--model", "hf", "--model_args", model, "--tasks", tasks,
            "--include_path", str(include), "--device", "cpu", "--limit", "2",
            "--output_path", str(self.out), "--log_samples", *flags,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def cases(
    chat_model: Path,
    task_folder: Path,
    task_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    """The harness's command has run for each, all in one process, which takes long to start.

    Its index is of our tasks alone: reading the thousands of its own takes long, and these are not
    asked for.
    """
    folder = tmp_path_factory.mktemp("theirs")
    whole = subject(chat_model)
    adapted = subject(chat_model, make_adapter(chat_model, folder / "adapter"))
    made = {
        "plain": Case(SHARED_TASKS, False, whole, folder / "plain"),
        "chat": Case(("arc_challenge", "winogrande"), True, whole, folder / "chat"),
        "adapter": Case(("hellaswag",), False, adapted, folder / "adapted"),
    }
    lines = [case.words(task_data, task_folder) for case in made.values()]
    program = (
        "import sys\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "from lm_eval.tasks import TaskManager\n"
        "from functools import partialmethod\n"
        "TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)\n"
        f"for sys.argv in {lines!r}:\n"
        "    cli_evaluate()\n"
    )
    subprocess.run(
        [python(), "-c", program],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return made


@pytest.mark.parametrize("name", ["plain", "chat", "adapter"])
def test_scores_equal_the_harness_own_command_line(
    name: str, cases: dict[str, Case], task_folder: Path, task_data: Path
) -> None:
    case = cases[name]
    (path,) = case.out.rglob("results_*.json")
    theirs = json.loads(path.read_text())
    plans = case.plans(task_data)
    assert len(theirs["results"]) == len(plans)
    with Harness(case.asked, task_folder, hub=False) as harness:
        for plan in plans:
            ours = harness.measure(plan, limit=2, chat=case.chat, advance=nothing)
            stated = theirs["results"][plan.harness_name]
            keys = [k for k in stated if "," in k and "_stderr" not in k]
            assert sorted(ours.metrics) == sorted(keys)
            for key in keys:
                metric, chosen = key.split(",")
                assert ours.metrics[key].value == stated[key]
                assert ours.metrics[key].error == stated[f"{metric}_stderr,{chosen}"]
            (path,) = case.out.rglob(f"samples_{plan.harness_name}_*.jsonl")
            samples = read_jsonl(path)
            for key in keys:
                metric, chosen = key.split(",")
                values = [s[metric] for s in samples if s["filter"] == chosen]
                assert list(ours.metrics[key].values) == values


@pytest.fixture(scope="module")
def measure(
    stories_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TaskScores]:
    folder = tmp_path_factory.mktemp("defined")

    def run(name: str, data: Path, shots: int | None, limit: int | None = 2) -> TaskScores:
        (plan,) = select_tasks([name], None, data, shots).tasks
        assert plan.data is not None
        write_tasks(plan.data, plan.harness_name, plan.shots, folder)
        with Harness(subject(stories_path), folder, hub=False) as harness:
            return harness.measure(plan, limit=limit, chat=False, advance=nothing)

    return run


def test_prompts_beyond_the_context_are_counted(
    measure: Callable[..., TaskScores], task_data: Path
) -> None:
    # Of stories260K the context is 512 tokens, which 25 examples do not fit into.
    found = measure("arc_challenge", task_data, None)
    assert found.shots == 25
    assert found.cut == 8  # two items of four choices each
    assert measure("arc_challenge", task_data, 0).cut == 0


def test_mmlu_by_subject_with_its_own_examples(
    measure: Callable[..., TaskScores], tmp_path: Path
) -> None:
    for split, count in (("test", 4), ("dev", 5)):
        for subject_name in ("anatomy", "world_religions"):
            path = tmp_path / "mmlu" / split / f"{subject_name}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = (f'"How many, {i}?",one,two,three,four,{"ABCD"[i % 4]}' for i in range(count))
            path.write_text("\n".join(rows) + "\n")
    found = measure("mmlu", tmp_path, None, limit=None)
    (score,) = found.metrics.values()
    assert found.shots == 5
    assert len(score.items) == 8
    assert score.value == pytest.approx(score.mean)
    assert task_scores_of(json.loads(json.dumps(found.as_json()))) == found


def test_the_suite_says_what_it_cannot_measure(shared_data: Path) -> None:
    plan = select_tasks([], "leaderboard-v1", shared_data / "evaluation", None)
    assert [(t.name, t.shots) for t in plan.tasks] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("truthfulqa_mc2", 0), ("winogrande", 5),
        ("gsm8k", 5),
    ]  # fmt: skip
    assert [title for title, _ in plan.left_out] == ["MMLU"]
    assert "mmlu/test/SUBJECT_test.csv" in plan.left_out[0][1]
    assert not plan.needs_hub
    noted = {task.name for task in plan.tasks if NOT_COMPARABLE in task.notes}
    assert noted == {"arc_challenge", "hellaswag", "winogrande", "gsm8k"}


def test_without_local_data_the_harness_own_tasks_are_meant() -> None:
    plan = select_tasks(["piqa"], "leaderboard-v1", None, None)
    assert [t.harness_name for t in plan.tasks][-2:] == ["gsm8k", "piqa"]
    assert [t.shots for t in plan.tasks] == [25, 10, 5, 0, 5, 5, None]
    assert plan.needs_hub


@pytest.mark.parametrize(
    ("names", "files", "said"),
    [
        (["mmlu"], {}, "has no mmlu/test/SUBJECT_test.csv"),
        (["piqa"], {}, "piqa has no local form; those that have are arc_challenge"),
        (["arc_easy"], {}, "has no arc_easy_test.jsonl"),
    ],
)
def test_a_task_without_data(
    names: list[str], files: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        select_tasks(names, None, tmp_path, None)


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("arc_easy", "arc_easy_test.jsonl", '{"query": "q"}\n', "no 'choices'"),
        (
            "arc_easy",
            "arc_easy_test.jsonl",
            '{"query": "q", "choices": ["a"], "gold": 1}\n',
            "row 1: gold is 1, and there are 1 choices",
        ),
        ("arc_easy", "arc_easy_test.jsonl", "not json\n", "Expecting value"),
        ("arc_easy", "arc_easy_test.jsonl", "", "has no items"),
        ("hellaswag", "hellaswag_val.txt", "one\n2\nthree\n", "3 lines, and an item has six"),
        ("hellaswag", "hellaswag_val.txt.bz2", "no bzip2", "Invalid data stream"),
        ("truthfulqa_mc2", "truthfulqa.csv", "A,B\n1,2\n", "no 'Correct Answers'"),
        ("gsm8k", "gsm8k_test.jsonl", "[1]\n", "row 1 is no JSON object"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, file: str, text: str, said: str, tmp_path: Path,
    measure: Callable[..., TaskScores],
) -> None:  # fmt: skip
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        measure(name, tmp_path, 0)
    assert file in str(caught.value)


def test_too_few_items_for_the_examples(measure: Callable[..., TaskScores], tmp_path: Path) -> None:
    row = '{"query": "q", "choices": ["a", "b"], "gold": 1}\n'
    (tmp_path / "arc_easy_test.jsonl").write_text(row)
    with pytest.raises(UserError, match="more items than few-shot examples"):
        measure("arc_easy", tmp_path, 3)


def test_an_unknown_task(stories_path: Path, tmp_path: Path) -> None:
    plan = Task("no_such_task", "", "", None, None)
    harness = Harness(subject(stories_path), tmp_path, hub=False)
    with pytest.raises(UserError, match="no task no_such_task"):
        harness.measure(plan, limit=1, chat=False, advance=nothing)


def test_nothing_is_printed(
    measure: Callable[..., TaskScores], task_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measure("gsm8k", task_data, 1, limit=1)
    assert capfd.readouterr() == ("", "")
