"""Rounds: pairs by the model of the round before, ranked, trained on, and so on; resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tandem.check.inputs import stage_data
from tandem.cli.main import main
from tandem.evaluate.scores import MeasurementStore
from tandem.plan.plan_recipe import plan_recipe
from tandem.recipe.load_recipe import load_recipe
from tandem.report.html import render
from tandem.report.run_facts import read_run
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.storage.hashing import hash_weights
from tandem.storage.run_folder import Stage, model_in_run, run_of, stages_in

from ..pairs.badly_behaved import Desk, badly_behaved
from ..stages.made_inputs import QUIET, make_conversations, make_model_folder
from .launcher import Done, Launcher
from .test_interruptions import leftovers

OF_ONE_ROUND = ["1-sft", "2-sft-merged", "3-pairs", "4-dpo", "5-final"]
ROUND_2 = ["round-02/3-pairs", "round-02/4-dpo", "round-02/5-final"]
RESULTS = (
    "5-final/model.safetensors",
    "round-02/3-pairs/pairs.jsonl",
    "round-02/3-pairs/generated/pairs-scores.jsonl",
    "round-02/4-dpo/adapter_model.safetensors",
    "round-02/5-final/model.safetensors",
)


def make_reward_model(folder: Path, model: Path) -> Path:
    """A classifier with one label and random weights, which scores texts in its own template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, pad_token_id=0
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a reward model, data, and a recipe with two rounds."""
    home = tmp_path_factory.mktemp("home")
    make_model_folder(home / "model")
    make_reward_model(home / "reward", home / "model")
    make_conversations(home / "conversations.jsonl", 16)
    make_conversations(home / "heldout.jsonl", 4)
    (home / "questions.jsonl").write_text('{"question": "say red", "answer": "red"}\n')
    stage = {"batch_size": 4, "max_length": 200, "save_steps": 1, "logging_steps": 1}
    lora = {"rank": 4, "alpha": 8}
    recipe = {
        "name": "in rounds",
        "model": "model",
        "output_dir": "runs/whole",
        "rounds": 2,
        "sft": {"data": "conversations.jsonl", "max_steps": 1, "lora": lora, **stage},
        "pairs": {
            "prompts": "conversations.jsonl",
            "heldout": "heldout.jsonl",
            "samples": 3,
            "max_new_tokens": 8,
            "rank": {"reward_model": "reward"},
        },
        "dpo": {"max_steps": 2, "learning_rate": 1e-2, **stage},
        "evaluate": {"questions": "questions.jsonl", "max_new_tokens": 4, "samples": 1},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.fixture(scope="module")
def launcher(home: Path) -> Launcher:
    return Launcher(home)


@pytest.fixture(scope="module")
def whole(home: Path, launcher: Launcher) -> Done:
    """The run of two rounds that nobody interrupts."""
    done = launcher.run("run", "recipe.yaml", root=home / "runs" / "whole", cache="cache-whole")
    assert done.code == 0, done.said
    return done


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A judge that rates an answer by its length."""
    with badly_behaved() as desk:
        desk.answer = lambda body: str(1 + len(body["messages"][-1]["content"]) % 10)
        yield desk


def same_results(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits, and measured the same."""
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    evaluations = [read_json(run / "6-evaluation" / "evaluation.json") for run in (one, other)]
    for evaluation in evaluations:
        for model in evaluation["models"].values():
            model.pop("path")
    assert evaluations[0] == evaluations[1]


@pytest.mark.usefixtures("whole")
def test_each_round_begins_with_the_model_of_the_round_before(home: Path) -> None:
    run = home / "runs" / "whole"
    pairs, dpo, merge = (read_json(run / name / "manifest.json")["inputs"] for name in ROUND_2)
    first = hash_weights(run / "5-final")
    assert pairs["model"] == dpo["model"]["weights"] == merge["base"]["weights"] == first
    before = read_json(run / "3-pairs" / "manifest.json")["inputs"]
    assert before["model"] == hash_weights(run / "2-sft-merged")
    assert [dpo["seed"], pairs["round"], before.get("round")] == [42, 2, None]
    # All models are measured on the pairs that were held out first; no later round makes others.
    assert (run / "3-pairs" / "heldout.jsonl").exists()
    assert not (run / "round-02" / "3-pairs" / "heldout.jsonl").exists()
    models = read_json(run / "6-evaluation" / "evaluation.json")["models"]
    assert [*models] == ["base", "sft", "dpo", "dpo-2"]
    assert models["dpo-2"]["path"].endswith("runs/whole/round-02/5-final")
    assert models["dpo-2"]["preference_margin"] != models["dpo"]["preference_margin"]


@pytest.mark.usefixtures("whole")
def test_a_rounds_scores_and_lengths_are_those_of_its_answers(home: Path) -> None:
    folder = home / "runs" / "whole" / "round-02" / "3-pairs"
    summary = read_json(folder / "summary.json")
    recorded = [
        dict(unit)
        for unit in (
            {n: v for line in read_jsonl(folder / "generated" / name)[1:] for n, v in line["unit"]}
            for name in ("pairs.jsonl", "pairs-scores.jsonl")
        )
    ]
    texts = {number: text.strip() for number, (text, _) in recorded[0].items()}
    scores = {number: score for number, (score, _) in recorded[1].items()}
    by_prompt = [
        [scores[n] for n in range(3 * i, 3 * i + 3) if n in scores]
        for i in range(summary["prompts"])
    ]
    means = torch.tensor([sum(each) / len(each) for each in by_prompt if each])
    assert summary["scores"]["answers"] == pytest.approx(float(means.mean()), abs=1e-6)
    error = float(means.std() / len(means) ** 0.5)
    assert summary["scores"]["error"] == pytest.approx(error, rel=1e-4)
    assert summary["scores"]["chosen"] > summary["scores"]["answers"]
    assert summary["scores"]["rejected"] < summary["scores"]["answers"]
    mean = sum(map(len, texts.values())) / len(texts)
    assert summary["characters"]["answers"] == pytest.approx(mean)
    rows = read_jsonl(folder / "pairs.jsonl")
    chosen = sum(len(row["chosen"]) for row in rows) / len(rows)
    assert summary["characters"]["chosen"] == pytest.approx(chosen)


@pytest.mark.usefixtures("whole")
def test_killed_in_its_second_round_it_ends_with_the_same_bits(
    home: Path, launcher: Launcher
) -> None:
    """The first round is that of the whole run; `--until` and `--from` name later stages."""
    run = home / "runs" / "killed"
    shutil.copytree(home / "runs" / "whole", run)
    shutil.rmtree(run / "round-02")
    shutil.rmtree(run / "6-evaluation")
    command = ("run", "recipe.yaml", "output_dir=runs/killed")
    kills = []
    for name, folder in zip(("pairs-2", "dpo-2", "dpo-merge-2"), ROUND_2, strict=True):
        for kill_at in (12, 30) if name != "dpo-merge-2" else (8,):
            done = launcher.run(
                *command, "--until", name, root=run / folder, cache="cache", kill_at=kill_at
            )
            kills += [name] if done.killed else []
    assert set(kills) == {"pairs-2", "dpo-2", "dpo-merge-2"}
    assert len(kills) >= 4
    done = launcher.run(*command, "--until", "pairs-2", root=run, cache="cache")
    assert "runs/killed/round-02/3-pairs is finished with these inputs" in done.said
    done = launcher.run(*command, "--from", "dpo-2", root=run, cache="cache")
    assert done.code == 0, done.said
    same_results(home / "runs" / "whole", run)
    assert leftovers(run) == []
    assert model_in_run(str(run)) == str(run / "round-02" / "5-final")


@pytest.mark.usefixtures("whole")
def test_another_round_is_added_to_a_finished_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was done is recognised, and only the new model is measured."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache-whole"))
    command = ["run", "recipe.yaml", "output_dir=runs/added"]
    run = home / "runs" / "added"
    for folder in OF_ONE_ROUND:  # the first round of several is the only one of a run with one
        shutil.copytree(home / "runs" / "whole" / folder, run / folder)
    assert main([*command, "rounds=1"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"runs/added/{folder} is finished with these inputs" in said
               for folder in OF_ONE_ROUND)  # fmt: skip
    assert [stage.folder for stage in stages_in(run)] == [*OF_ONE_ROUND, "6-evaluation"]
    assert "Rounds</h2>" not in (run / "report.html").read_text()
    card = (run / "5-final" / "README.md").read_text()
    measured = []
    find = MeasurementStore.find

    def found(self: MeasurementStore, what: str, key: Any) -> Any:
        before = find(self, what, key)
        measured.append(before is not None)
        return before

    monkeypatch.setattr(MeasurementStore, "find", found)
    capsys.readouterr()
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    for folder in OF_ONE_ROUND:
        assert f"runs/added/{folder} is finished with these inputs" in said
    assert measured == [True, True, True, False]
    same_results(home / "runs" / "whole", run)
    # The models of earlier rounds keep their cards, and the newest one has its own.
    assert (run / "5-final" / "README.md").read_text() == card
    newest = (run / "round-02" / "5-final" / "README.md").read_text()
    assert "## Direct Preference Optimization, round 2" in newest
    assert "DPO, round 2" in newest.partition("## Evaluation")[2]
    assert main([*command, "rounds=1"]) == 2
    assert "models.dpo-2" in capsys.readouterr().err


@pytest.mark.usefixtures("whole")
def test_the_page_shows_all_rounds(home: Path) -> None:
    run = home / "runs" / "whole"
    page = render(facts := read_run(run))
    for folder in (*OF_ONE_ROUND, *ROUND_2):
        assert f"<code>{folder}</code>" in page
    assert [stage.folder for stage in facts.known] == [*OF_ONE_ROUND, *ROUND_2, "6-evaluation"]
    rows = page.partition('<section id="rounds">')[2].partition("</table>")[0]
    assert rows.count("<tr>") == 4
    summary = read_json(run / "round-02" / "3-pairs" / "summary.json")
    assert f"{summary['scores']['answers']:.3g}"[:5] in rows
    for title in ("Scores", "Held-out preference accuracy", "Held-out margin", "Length of answers"):
        assert f"<h3>{title}</h3>" in page
    assert "DPO, round 2" in page
    assert list(read_json(run / "manifest.json")["stages"]) == [
        *OF_ONE_ROUND, *ROUND_2, "6-evaluation",
    ]  # fmt: skip


@pytest.mark.usefixtures("whole")
def test_a_plan_counts_the_rounds_and_says_which_pairs_are_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    recipe = load_recipe("recipe.yaml", ["rounds=3"])
    plan = plan_recipe(recipe, processes=1, download=False, console=QUIET)
    assert [one.name for one in plan.trained] == ["sft", "dpo", "dpo-2", "dpo-3"]
    second, third = plan.trained[2:]
    assert second.estimate is not None
    assert second.estimate.work.records == len(
        read_jsonl(home / "runs/whole/round-02/3-pairs/pairs.jsonl")
    )
    # `tandem check` looks at the pairs that were made last.
    checked = stage_data("dpo", recipe, None, home)
    assert checked.sources[0].path.endswith("round-02/3-pairs/pairs.jsonl")
    assert third.estimate is None
    assert third.notes[0] == "the pairs are not made yet"
    assert "--until pairs-3" in third.notes[1]


def test_all_weights_are_trained_in_rounds_without_sft(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage merges, and the run's model is that of the last round."""
    monkeypatch.chdir(home)
    assert main([
        "run", "recipe.yaml", "output_dir=runs/full", "sft=null", "dpo.full=true",
        "evaluate=null", "dpo.max_steps=1",
    ]) == 0  # fmt: skip
    run = home / "runs" / "full"
    names = ["3-pairs", "4-dpo", "round-02/3-pairs", "round-02/4-dpo"]
    assert [stage.folder for stage in stages_in(run)] == names
    second = read_json(run / "round-02/4-dpo/manifest.json")["inputs"]
    assert second["model"]["weights"] == hash_weights(run / "4-dpo")
    assert (
        second["chat_template"]["hash"]
        == (read_json(run / "4-dpo/manifest.json")["inputs"]["chat_template"]["hash"])
    )
    assert model_in_run(str(run)) == str(run / "round-02" / "4-dpo")


def judged(desk: Desk, *more: str) -> list[str]:
    """The recipe's command with a judge on a server."""
    judge = {"base_url": desk.url, "model": "judge", "retries": 0}
    rank = f"pairs.rank={json.dumps({'judge': judge})}"
    return ["run", "recipe.yaml", rank, "pairs.select.count=6", "dpo.max_steps=1", *more]


def test_a_judge_that_is_not_there_is_missed_before_the_first_step(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk
) -> None:
    monkeypatch.chdir(home)
    run = home / "runs" / "unjudged"
    command = judged(desk, "output_dir=runs/unjudged")
    desk.plan = {"*": [503]}
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "pairs.rank.judge" in said
    assert "does not answer as 'judge' (HTTP 503" in said
    assert "Start the server" in said
    desk.answer = lambda _: "Let me think about it first."
    assert main(command) == 2
    assert "is not a single number from 1 to 10" in " ".join(capsys.readouterr().err.split())
    assert len(desk.bodies) == 2
    shutil.copytree(home / "reward", home / "two", dirs_exist_ok=True)
    config = read_json(home / "two" / "config.json")
    (home / "two" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "", "1": ""}}))
    mute = shutil.copytree(home / "reward", home / "mute", dirs_exist_ok=True)
    (mute / "chat_template.jinja").unlink()
    for folder, why in (
        ("./none", "does not exist"),
        ("model", "names no sequence classifier"),
        ("two", "has 2 labels"),
        ("mute", "has no chat template"),
    ):
        assert main(["run", "recipe.yaml", "output_dir=runs/unjudged",
                     f"pairs.rank.reward_model={folder}"]) == 2  # fmt: skip
        said = " ".join(capsys.readouterr().err.split())
        assert "pairs.rank.reward_model: " in said
        assert why in said
    # What needs no judge may be run without one.
    assert not run.exists()
    desk.plan = {"*": [503]}
    assert main([*command, "--until", "sft-merge"]) == 0
    assert len(desk.bodies) == 2


@pytest.mark.usefixtures("whole")
def test_a_judge_that_goes_between_rounds_costs_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk
) -> None:
    monkeypatch.chdir(home)
    run = home / "runs" / "judged"
    for folder in OF_ONE_ROUND[:2]:
        shutil.copytree(home / "runs" / "whole" / folder, run / folder)
    command = judged(desk, "output_dir=runs/judged", "evaluate=null")
    come = desk.come
    away = [503]

    def gone(body: dict[str, Any], headers: dict[str, str]) -> Any:
        trouble = come(body, headers)
        return away[0] if (run / "5-final" / "manifest.json").exists() and away else trouble

    monkeypatch.setattr(desk, "come", gone)
    assert main(command) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "Round 2 has not begun, and nothing is lost." in said
    assert not list((run / "round-02" / "3-pairs").glob("generated/*"))
    # The same command looks for the judge first, and goes on where it was once that is back.
    assert main(command) == 2
    assert "pairs.rank.judge" in capsys.readouterr().err
    away.clear()
    asked = len(desk.bodies)
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "runs/judged/5-final is finished with these inputs" in said
    assert (run / "round-02" / "5-final" / "config.json").exists()
    scored = read_jsonl(run / "round-02/3-pairs/generated/pairs-scores.jsonl")[1:]
    assert len(desk.bodies) - asked == 1 + sum(len(line["unit"]) for line in scored)


def test_stages_of_rounds_have_names_and_folders_that_sort() -> None:
    assert Stage("dpo").name == "dpo"
    assert Stage("dpo").folder == "4-dpo"
    second = Stage("dpo-merge", 2)
    assert (second.name, second.folder) == ("dpo-merge-2", "round-02/5-final")
    assert second.title == "Merge of the DPO adapter, round 2"
    tenth = Stage("pairs", 10)
    assert sorted([tenth.folder, second.folder]) == [second.folder, tenth.folder]
    order = sorted([Stage("evaluate"), tenth, second, Stage("sft")], key=lambda one: one.place)
    assert order == [Stage("sft"), second, tenth, Stage("evaluate")]
    assert run_of(Path("runs/a/4-dpo")) == run_of(Path("runs/a/round-02/4-dpo")) == Path("runs/a")


def test_demo_data_of_a_later_round_is_that_of_the_run(tmp_path: Path) -> None:
    from tandem.cli.run import dry_run_text
    from tandem.pipeline.stage_jobs import pairs_job

    recipe = load_recipe("demo", ["rounds=2", "pairs.parts=2", f"output_dir={tmp_path}"])
    assert run_of(pairs_job(recipe, 2).folder) == tmp_path
    text = dry_run_text(recipe, until="dpo-merge-2", start=None)
    (line,) = [one for one in text.splitlines() if one.startswith("#   pairs-2")]
    assert "part 2 of 2 of demo:prompts" in line
    assert "not asked for" in text.splitlines()[-1]


WRONG = [
    (["pairs=null", "dpo.data=x.jsonl"], "the recipe has no pairs section"),
    (["dpo=null"], "the recipe has no dpo section"),
    (["dpo.data=x.jsonl"], "dpo.data names x.jsonl; remove dpo.data"),
    (["pairs.model=other"], "remove pairs.model"),
    (["pairs.server={base_url: http://a/v1, model: m}"], "remove pairs.server"),
    (["pairs.parts=2", "rounds=3"], "set pairs.parts to 3 or more"),
    (["dpo.validation.fraction=0.1"], "divide the prompts (pairs.parts: 2)"),
    (["dpo.lora.from=adapter"], "remove it, or set rounds: 1"),
    (["rounds=100"], "less than or equal to 99"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[text for _, text in WRONG])
def test_what_cannot_be_done_in_rounds_says_what_to_do(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = wrong if wrong[-1].startswith("rounds") else ["rounds=2", *wrong]
    assert main(["run", "demo", *overrides, "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_divided_prompts_may_be_held_out_by_a_fraction() -> None:
    """Prompts of one round are never asked in another, so none of them is trained on later."""
    recipe = load_recipe("demo", ["rounds=2", "pairs.parts=3", "dpo.validation.fraction=0.1"])
    assert recipe.rounds == 2


def test_pairs_by_hand_ask_the_recipes_prompts_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tandem pairs` takes the section of a recipe with rounds, and names a model of its own."""
    monkeypatch.chdir(home)
    out = StringIO()
    monkeypatch.setattr("sys.stdout", out)
    assert main(["pairs", "--recipe", "recipe.yaml", "--model", "model", "--output_dir",
                 str(tmp_path / "out"), "--dry-run"]) == 0  # fmt: skip
    assert "model: model" in out.getvalue()
