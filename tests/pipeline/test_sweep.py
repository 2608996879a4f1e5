"""A sweep shares all before DPO, compares its trials honestly, and survives what happens to it."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.main import main
from tandem.pipeline.sweep.grid import split_values
from tandem.pipeline.sweep.state import Halving
from tandem.runtime.local_launcher import run_processes
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.storage.hashing import hash_file

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs
from ..warm.python import python
from .launcher import Launcher

RECIPE = {
    "name": "little",
    "model": "model",
    "output_dir": "runs/little",
    "sft": {"data": "talk.jsonl", "max_steps": 2, "batch_size": 4, "max_length": 200},
    "dpo": {
        "data": "pairs.jsonl",
        "batch_size": 6,
        "max_steps": 8,
        "learning_rate": 2e-3,
        "max_length": 200,
        "save_steps": 3,
        "logging_steps": 1,
        "validation": {"fraction": 0.25, "steps": 4},
        "lora": {"rank": 4, "alpha": 8},
    },
}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, data and a recipe, in the current folder, with a cache of its own."""
    home = tmp_path_factory.mktemp("sweeps")
    make_model_folder(home / "model")
    make_conversations(home / "talk.jsonl")
    make_pairs(home / "pairs.jsonl", 32)
    (home / "little.yaml").write_text(yaml.safe_dump(RECIPE))
    dpo = {**RECIPE, "output_dir": "runs/aligned", "sft": None}
    (home / "aligned.yaml").write_text(yaml.safe_dump(dpo))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.chdir(home)
        yield home


LITTLE = ("little.yaml", "dpo.max_steps=4")


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "sweep.json")
    return found


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in facts(folder)["trials"]}


def adapters(folder: Path) -> dict[str, str]:
    return {one.parent.name: hash_file(one) for one in folder.glob(f"trials/*/{ADAPTER}")}


def encoded(home: Path) -> list[str]:
    """The encoded data sets that the cache has."""
    return sorted(path.name for path in (home / "cache" / "tandem").rglob("*") if path.is_dir())


@pytest.fixture(scope="module")
def swept(home: Path) -> Path:
    """Four trials after SFT."""
    assert main(["sweep", *LITTLE, "dpo.beta=0.05,0.2", "dpo.loss=sigmoid,ipo"]) == 0
    return home / "runs" / "little" / "sweep" / "beta+loss"


def test_another_beta_or_loss_costs_no_second_sft_encoding_or_reference_pass(
    swept: Path, home: Path
) -> None:
    found = trials(swept)
    names = [f"beta={beta},loss={loss}" for beta in (0.05, 0.2) for loss in ("sigmoid", "ipo")]
    assert list(found) == names
    computed = [found[name]["reference_computed"] for name in names]
    assert computed == [32, 0, 0, 0]
    summaries = [read_json(Path(found[name]["folder"]) / "summary.json") for name in names]
    assert len({one["examples_hash"] for one in summaries}) == 1
    # SFT and DPO encoded their data once each: the cache has got nothing more of later trials
    before = encoded(home)
    assert main(["sweep", *LITTLE, "dpo.beta=0.05,0.2,0.4", "dpo.loss=sigmoid,ipo"]) == 0
    assert encoded(home) == before
    assert len(list((swept / "scores").glob("start-*.json"))) == 1
    root = home / "runs" / "little"
    assert sorted(path.name for path in root.glob("[0-9]-*")) == ["1-sft", "2-sft-merged"]


def test_more_values_leave_finished_trials_as_they_are(swept: Path) -> None:
    """The test before has added a beta; here they are listed in another order, and again."""
    stamps = {path: path.stat().st_mtime_ns for path in swept.glob("trials/*/*")}
    assert len(list(swept.glob("trials/*"))) == 6
    assert main(["sweep", *LITTLE, "dpo.loss=ipo,sigmoid", "dpo.beta=0.2,0.05"]) == 0
    assert {path: path.stat().st_mtime_ns for path in swept.glob("trials/*/*")} == stamps
    assert facts(swept)["others"] == ["beta=0.4,loss=ipo", "beta=0.4,loss=sigmoid"]


def test_scores_are_those_of_the_losses_whatever_beta_is(swept: Path) -> None:
    for name, one in trials(swept).items():
        last = read_jsonl(Path(one["folder"]) / "validation.jsonl")[-1]
        scores = {key: value["value"] for key, value in one["scores"].items()}
        assert scores["accuracy"] == pytest.approx(last["eval_rewards/accuracies"]), name
        margin = last["eval_rewards/margins"] / one["beta"]
        assert scores["margin"] == pytest.approx(margin, rel=1e-4)
        assert scores["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
        assert one["step"] == one["of"] == 4
        assert one["records"] == 8


def kept_scores(folder: Path, name: str, at: str = "end") -> dict[str, Any]:
    found = [read_json(path) for path in (folder / "scores").glob("*.json")]
    return next(one["result"] for one in found if one["name"] == name and one["key"]["at"] == at)


def test_differences_are_paired_and_have_the_error_of_the_pairs(swept: Path) -> None:
    found, best = trials(swept), facts(swept)["best"]
    name = next(one for one in found if one != best)
    one, other = (kept_scores(swept, each)["margins"] for each in (name, best))
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    difference, error = found[name]["scores"]["margin"]["difference"]
    assert difference == pytest.approx(statistics.mean(gaps))
    assert error == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)))
    assert found[best]["scores"]["margin"]["difference"] is None


def test_the_best_is_by_accuracy_then_by_margin(swept: Path) -> None:
    found = trials(swept)
    order = sorted(
        found.values(),
        key=lambda one: (-one["scores"]["accuracy"]["value"], -one["scores"]["margin"]["value"]),
    )
    assert facts(swept)["best"] == order[0]["name"]


def test_the_page_shows_every_trial_and_says_what_few_records_leave_open(swept: Path) -> None:
    page = (swept / "sweep.html").read_text()
    for name in trials(swept):
        assert page.count(name) >= 3  # in the table, and in the titles of its curves' points
    assert "With 8 held-out records the standard error of an accuracy is up to 18 points" in page
    assert "Chosen by what is shown" in page
    assert not re.search(r"https?://", page)
    (swept / "sweep.html").unlink()
    assert main(["report", str(swept)]) == 0
    assert (swept / "sweep.html").read_text() == page


def test_the_best_is_taken_as_the_runs_own_stage_and_is_what_the_run_would_train(
    swept: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = facts(swept)["best"]
    own = home / "runs" / "little" / "4-dpo"
    trial = swept / "trials" / best
    run = ["run", str(swept / "best.yaml"), "--until", "dpo"]
    assert main(run) == 0  # trained again, to the same bits, and nothing before it
    assert "1-sft is finished with these inputs" in capsys.readouterr().err
    assert hash_file(own / ADAPTER) == adapters(swept)[best]
    shutil.rmtree(own)
    listed = ["sweep", *LITTLE, "dpo.beta=0.05,0.2", "dpo.loss=sigmoid,ipo"]
    assert main([*listed, "--take"]) == 0
    assert (own / ADAPTER).samefile(trial / ADAPTER)
    assert not (own / "checkpoints").exists()
    capsys.readouterr()
    assert main(run) == 0
    assert "4-dpo is finished with these inputs" in capsys.readouterr().err
    # a stage of something else is not replaced
    shutil.rmtree(own)
    shutil.copytree(swept / "trials" / "beta=0.4,loss=ipo", own)
    assert main([*listed, "--take"]) == 2
    assert "4-dpo holds a DPO stage that is none of the trials" in capsys.readouterr().err


def test_a_damaged_score_is_named_with_the_way_out(
    swept: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = home / "damaged"
    shutil.copytree(home / "runs" / "little", copy)
    file = next((copy / "sweep" / "beta+loss" / "scores").glob("beta-0.05-loss-ipo-*.json"))
    file.write_text(file.read_text().replace("1", "2", 1))
    listed = ["sweep", *LITTLE, "dpo.beta=0.05,0.2", "dpo.loss=sigmoid,ipo", f"output_dir={copy}"]
    assert main(listed) == 2
    said = capsys.readouterr().err
    assert file.name in said
    assert "beta=0.05,loss=ipo to train this trial again" in said


RATES, SLOWEST = "dpo.learning_rate=1e-5,1e-4,2e-3,4e-3", "1e-5"


def found_value(folder: Path, trial: str) -> float:
    value: float = trials(folder)[trial]["values"]["dpo.learning_rate"]
    return value


@pytest.fixture(scope="module")
def halved(home: Path) -> Path:
    """Four rates, compared after two and after four of eight steps."""
    assert main(["sweep", "aligned.yaml", RATES, "--halving", "--metric", "margin"]) == 0
    return home / "runs" / "aligned" / "sweep" / "learning_rate"


def test_trials_that_are_behind_stop_and_the_others_end_with_the_same_bits(
    halved: Path, home: Path
) -> None:
    found = trials(halved)
    states = {name: (one["state"], one["step"]) for name, one in found.items()}
    assert sorted(states.values()) == [("finished", 8), ("stopped", 2), ("stopped", 2),
                                       ("stopped", 4)]  # fmt: skip
    best = facts(halved)["best"]
    assert states[best] == ("finished", 8)
    # a stopped trial is compared with what the best scored at the same step
    behind = next(one for one in found.values() if one["step"] == 2)
    at = behind["compared_at"]
    gaps = [
        a - b
        for a, b in zip(
            kept_scores(halved, behind["name"], at)["margins"],
            kept_scores(halved, best, at)["margins"],
            strict=True,
        )
    ]
    assert behind["scores"]["margin"]["difference"][0] == pytest.approx(statistics.mean(gaps))
    # never paused: the same bits, rates and scores
    plain = f"dpo.learning_rate={found_value(halved, best)},{SLOWEST}"
    assert main(["sweep", "aligned.yaml", plain, "--name", "plain"]) == 0
    other = halved.with_name("plain")
    assert adapters(halved) == {best: adapters(other)[best]}
    rates = [
        [line["learning_rate"] for line in read_jsonl(folder / "trials" / best / "metrics.jsonl")]
        for folder in (halved, other)
    ]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8
    assert kept_scores(halved, best)["margins"] == kept_scores(other, best)["margins"]


def test_a_sweep_without_halving_goes_on_with_the_stopped_and_not_the_other_way_round(
    halved: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = facts(halved)["best"]
    copy = home / "copy"
    shutil.copytree(home / "runs" / "aligned", copy)
    two = f"dpo.learning_rate={found_value(halved, best)},{SLOWEST}"
    sweep = ["sweep", "aligned.yaml", two, f"output_dir={copy}", "--metric", "margin"]
    assert main(sweep) == 0
    folder = copy / "sweep" / "learning_rate"
    assert adapters(folder) == adapters(halved.with_name("plain"))
    assert {one["state"] for one in trials(folder).values()} == {"finished"}
    assert main([*sweep, "--halving"]) == 2
    assert "has trials that began without --halving" in capsys.readouterr().err


SIX = "dpo.learning_rate=1e-4,5e-4,1e-3,2e-3,3e-3,4e-3"


def test_six_values_killed_three_times_end_as_a_sweep_that_was_not(home: Path) -> None:
    sweep = ["sweep", "aligned.yaml", SIX, "dpo.max_steps=3", "dpo.save_steps=2"]
    sweep += ["--halving", "--rungs", "1", "--keep", "0.3", "--metric", "margin"]
    assert main([*sweep, "output_dir=runs/whole"]) == 0
    root, killed = home / "runs" / "killed", [*sweep, "output_dir=runs/killed"]
    # in the second trial; later in the first round; and among those that go on
    for change in (60, 80, 70):
        assert Launcher(home).run(*killed, root=root, cache="cache", kill_at=change).killed
    assert main(killed) == 0
    one, other = (home / "runs" / name / "sweep" / "learning_rate" for name in ("whole", "killed"))
    assert len(adapters(one)) == 2
    assert adapters(one) == adapters(other)
    assert table(facts(one)) == table(facts(other))


def table(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep says, without times, places and what was found in the cache."""
    left_out = ("folder", "seconds", "reference_seconds", "reference_computed")
    rows = [{k: v for k, v in one.items() if k not in left_out} for one in found["trials"]]
    return {**found, "trials": rows, "checksum": None}


def test_a_trial_that_diverges_is_kept_as_failed_and_the_others_go_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["sweep", "aligned.yaml", "dpo.learning_rate=1e30,1e-3", "output_dir=runs/diverged"]
    sweep += ["dpo.max_steps=3"]
    for _ in range(2):  # the second time it is known
        assert main(sweep) == 1
        said = capsys.readouterr()
        assert "is not finite" in said.err + said.out
    found = trials(home / "runs" / "diverged" / "sweep" / "learning_rate")
    assert [one["state"] for one in found.values()] == ["failed", "finished"]
    assert "learning_rate=1e+30 failed" in said.out
    # once its folder is removed, it is tried again
    shutil.rmtree(found["learning_rate=1e+30"]["folder"])
    assert main([*sweep, "--dry-run"]) == 0
    assert "learning_rate=1e+30  new" in capsys.readouterr().out
    assert main(sweep) == 1
    assert "dpo: step 1/3" in capsys.readouterr().err


def test_several_processes_share_every_trial(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one of them fails, which all processes must learn, and all go on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sweep = ["sweep", "aligned.yaml", "dpo.learning_rate=1e30,1e-3", "dpo.max_steps=4"]
    sweep += ["--halving", "--rungs", "1", "output_dir=runs/several"]
    said: list[str] = []
    command = [python(), "-m", "tandem", *sweep]
    assert run_processes(2, command, log=said.append) == 1
    found = trials(home / "runs" / "several" / "sweep" / "learning_rate")
    assert [one["state"] for one in found.values()] == ["failed", "finished"]
    folder = Path(found["learning_rate=0.001"]["folder"])
    assert read_json(folder / "summary.json")["processes"] == 2
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_best_adapter_of_a_trial_is_what_is_compared(home: Path) -> None:
    sweep = [
        "sweep",
        "aligned.yaml",
        "dpo.learning_rate=2e-3,0.3",
        "dpo.keep=best",
        "dpo.best_metric=accuracy",
    ]
    sweep += ["output_dir=runs/best", "dpo.validation.steps=1", "dpo.max_steps=3"]
    assert main(sweep) == 0
    folder = home / "runs" / "best" / "sweep" / "learning_rate"
    for one in trials(folder).values():
        lines = read_jsonl(Path(one["folder"]) / "validation.jsonl")
        kept = max(lines, key=lambda line: line["eval_rewards/accuracies"])
        assert one["scored_step"] == kept["step"]
        assert one["scores"]["loss"]["value"] == pytest.approx(kept["eval_loss"], rel=1e-5)
    assert any(one["scored_step"] < 3 for one in trials(folder).values())


def test_losses_of_whole_steps_and_of_weighted_tokens_are_those_of_the_evaluation(
    home: Path,
) -> None:
    for name, keys in (
        ("answers", ["dpo.loss=kto", "dpo.beta=0.1,1.0"]),
        ("steps", ["dpo.loss=aot,simpo", "dpo.ld_alpha=0.5"]),
    ):
        sweep = ["sweep", "aligned.yaml", *keys, f"output_dir=runs/{name}"]
        assert main([*sweep, "dpo.max_steps=2", "dpo.learning_rate=2e-2"]) == 0
        (folder,) = (home / "runs" / name / "sweep").iterdir()
        for one in trials(folder).values():
            last = read_jsonl(Path(one["folder"]) / "validation.jsonl")[-1]
            assert one["scores"]["loss"]["value"] == pytest.approx(last["eval_loss"], rel=1e-4)
            assert one["scores"]["margin"]["value"] != 0


def test_a_sweep_of_other_keys_has_a_folder_of_its_own(
    halved: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "aligned.yaml", "dpo.lora.rank=2,4", "dpo.max_steps=1"]) == 0
    names = {path.name for path in (home / "runs" / "aligned" / "sweep").iterdir()}
    assert {"learning_rate", "lora.rank"} <= names
    # the same keys with other settings are refused before a step
    assert main(["sweep", "aligned.yaml", RATES, "dpo.max_steps=2"]) == 2
    said = capsys.readouterr().err
    assert "settings.max_steps: 8 -> 2" in said
    assert f"another --name than {halved.name}" in said


WRONG: tuple[tuple[list[str], tuple[str, ...]], ...] = (
    (["dpo.betta=1,2"], ("unknown key dpo.betta; did you mean dpo.beta?",)),
    (["sft.learning_rate=1e-4,2e-4"], ("changes SFT", "run the recipe once for each value")),
    (["model=a,b"], ("belongs to the whole run",)),
    (["dpo.data=a.jsonl,b.jsonl"], ("decides which records",)),
    (["dpo.logging_steps=1,2"], ("does not change the result",)),
    (["dpo.lora.from=model,x"], ("changes what DPO begins with",)),
    (["dpo.beta=0.1,-1,x", "dpo.loss=ipo,foo"],
     ("dpo.beta is -1", "dpo.beta is 'x'", "there is no loss 'foo'")),
    (["dpo.loss=sigmoid,simpo,ipo", "dpo.simpo_gamma=0.3"],
     ("dpo.loss=sigmoid: dpo: simpo_gamma has no effect", "with loss ipo")),
    (["dpo.beta=0.1,1e-1"], ("1e-1 repeats 0.1",)),
    (["dpo.beta=0.1,,0.2"], ("a value between commas is missing",)),
    (["dpo.beta=0.1"], ("no key has several values",)),
    (["dpo.beta=0.1,0.2", "dpo.beta=0.3"], ("dpo.beta is given twice",)),
    (["dpo.beta=0.1,0.2", "dpo=null"], ("has no dpo section",)),
    (["dpo.beta=0.1,0.2", "dpo.data=[]", "pairs.prompts=x.jsonl", "pairs.parts=2", "rounds=2"],
     ("a sweep compares one DPO stage", "rounds=1")),
    (["dpo.beta=0.1,0.2", "dpo.validation=null"], ("dpo.validation.fraction=0.1",)),
    (["dpo.loss=sigmoid,kto"], ("train on different records",)),
    (["dpo.beta=0.1,0.2", "--metric", "loss"], ("cannot be compared; take accuracy or margin",)),
    (["dpo.beta=0.1,0.2", "--keep", "0.3"], ("no effect without --halving",)),
    (["dpo.beta=0.1,0.2", "--halving", "--keep", "1"], ("not between 0 and 1",)),
    (["dpo.beta=0.1,0.2", "--halving", "--rungs", "4"], ("8 steps is too short",)),
    (["dpo.beta=0.1,0.2", "--name", "../x"], ("letters, digits",)),
    (["dpo.lora.target_modules=[q_proj],[nothing]"], ("nothing",)),
)  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[" ".join(one) for one, _ in WRONG])
def test_mistakes_are_told_before_anything_is_trained(
    given: list[str], said: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "little.yaml", *given, "output_dir=runs/wrong"]) == 2
    error = capsys.readouterr().err
    assert all(one in error for one in said), error
    assert not (home / "runs" / "wrong").exists()


def test_a_dry_run_lists_trials_and_what_they_share(
    swept: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *LITTLE, "dpo.beta=0.05,9", "dpo.loss=ipo,hinge", "--dry-run",
                 "--halving"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "shared: sft, sft-merge;" in said
    assert "4 trials to 0.25 of their steps, 2 trials to 0.5 of their steps, 1 to the end" in said
    assert "beta=0.05,loss=ipo  finished" in said
    assert "beta=9.0,loss=hinge  new" in said


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.2", ["0.1", "0.2"]),
        ("0.1, 0.2", ["0.1", "0.2"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{sigmoid: 1, sft: 0.1},ipo", ["{sigmoid: 1, sft: 0.1}", "ipo"]),
        ('"a,b"', ['"a,b"']),
        ("'a,b',c", ["'a,b'", "c"]),
        ("it's,fine", ["it's", "fine"]),
        ("a", ["a"]),
        ("", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_divide(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize(("count", "going"), [(6, 3), (3, 2), (2, 1), (1, 1)])
def test_half_of_the_trials_go_on_the_odd_one_too(count: int, going: int) -> None:
    assert Halving(0.5, 2).survivors(count) == going
    assert Halving(0.5, 2).shares == [0.25, 0.5]
    assert Halving(1 / 3, 1).survivors(3) == 1
