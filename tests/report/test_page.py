"""The page: complete for a whole run, partial for a part of one, safe against what models say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tandem.cli.run import _finish
from tandem.errors import UserError
from tandem.report.html import write_report
from tandem.report.result_rows import shown_measures
from tandem.report.run_facts import read_run, run_warnings
from tandem.report.training_section import tiles
from tandem.result_warnings import evaluation_warnings
from tandem.wording import chosen_collapse

from .made_runs import (
    NASTY,
    dpo_stage,
    evaluation,
    measured_evaluation,
    run_folder,
    sft_stage,
    write,
    write_lines,
)

VOID = {"meta", "br", "circle", "line", "path", "rect"}


class Page(HTMLParser):
    """The page's elements and text; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_tasks_and_standard_errors(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "demo")
    assert "With standard errors" not in page_of(run).text
    write(run / "6-evaluation" / "evaluation.json", measured_evaluation())
    page = page_of(run)
    for expected in ("With standard errors", "ARC-easy", "46.5 % ± 2.0", "+0.5 ± 0.4", NASTY):
        assert expected in page.text, expected
    assert "script" not in page.tags


def test_whole_run_shows_everything(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "demo"))
    for expected in (
        "84.2 %", "as completion 95.8 %", "+27.3", "Supervised fine-tuning", "Rewards",
        "Log-probs of the answers", "Learning rate", "Gradient norm",
        "What packing and sharing saved",
        "188k, 1.95×", "no assistant turn <b>", "The chemical symbol of gold is Au.", "2.13.0",
        "batch_size: 16", "same as chosen", "A spider has eight legs.",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags.count("svg") == 5 + 2 + 1 + 9 + 2 + 1


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path / "demo"))
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href", "srcset", "style")]
    assert "url(" not in path.read_text(encoding="utf-8")
    assert "default-src 'none'" in path.read_text(encoding="utf-8")


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "demo")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"# {NASTY}\n")
    summary = json.loads((folder / "1-sft" / "summary.json").read_text())
    summary["warnings"] = [NASTY]
    write(folder / "1-sft" / "summary.json", summary)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6
    Page(text)


def test_same_files_give_the_same_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "demo")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_partial_run_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "demo", until="sft"))
    assert "partial run" in page.text
    assert "Direct Preference Optimization (4-dpo)" in page.text
    assert "Result" not in page.text


def test_single_stage_folders(tmp_path: Path) -> None:
    sft_stage(tmp_path / "mine")
    dpo_stage(tmp_path / "other")
    assert "Supervised fine-tuning" in page_of(tmp_path / "mine").text
    assert "Reward margin" in page_of(tmp_path / "other").text


def test_titles_and_captions_are_those_of_the_loss(tmp_path: Path) -> None:
    usual, other = tmp_path / "usual", tmp_path / "other"
    for folder, loss in ((usual, None), (other, "simpo")):
        dpo_stage(folder)
        found = json.loads((folder / "manifest.json").read_text())
        found["inputs"]["settings"] = {"loss": loss} if loss else {}
        write(folder / "manifest.json", found)
    page = page_of(usual).text
    assert "Direct Preference Optimization" in page
    assert "ln 2 = 0.693 at step 0" in page
    page = page_of(other).text
    assert "Preference training (simpo)" in page
    assert "beta × log-prob a token, chosen minus rejected" in page
    assert "policy − reference" not in page
    assert "ln 2" not in page


def test_running_stage_without_summary(tmp_path: Path) -> None:
    sft_stage(tmp_path / "mine", steps=7, finished=False)
    text = page_of(tmp_path / "mine").text
    assert "Supervised fine-tuning is not finished" in text
    assert "Loss" in text


def test_damaged_files_are_named_not_fatal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "demo")
    (folder / "1-sft" / "summary.json").write_text("{half")
    with (folder / "4-dpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": NaN, "grad_norm": null}\n{"step"')
    text = page_of(folder).text
    assert "1-sft/summary.json cannot be read" in text
    assert "4-dpo/metrics.jsonl, row 62" in text


def test_files_that_are_gone_are_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "demo")
    assert read_run(folder).problems == ()
    (folder / "1-sft" / "manifest.json").unlink()
    (folder / "recipe.yaml").write_text("[1, 2]")
    assert "recipe.yaml holds no recipe" in read_run(folder).problems
    (folder / "recipe.yaml").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert "1-sft/manifest.json is missing" in page
    assert "recipe.yaml is missing" in page


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_folder_that_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_collapse_is_named(tmp_path: Path) -> None:
    found = run_warnings(read_run(run_folder(tmp_path / "bad", fall=9.0)))
    assert [f.text.partition(":")[0] for f in found] == ["collapse of the chosen log-probs"]
    assert "−" not in found[0].text
    assert run_warnings(read_run(run_folder(tmp_path / "good", fall=0.4))) == []


def test_training_that_names_the_collapse_is_not_repeated(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "bad", fall=9.0)
    summary = json.loads((folder / "4-dpo" / "summary.json").read_text())
    summary["warnings"] = ["collapse: the chosen log-probs fell by 8 nats"]
    write(folder / "4-dpo" / "summary.json", summary)
    assert len(run_warnings(read_run(folder))) == 1


def test_loss_of_accuracy_beyond_chance_is_named() -> None:
    value = evaluation()
    value["models"]["dpo"]["answer_accuracy"] = 0.80  # 3 questions of 120: chance
    assert evaluation_warnings(value) == []
    value["models"]["dpo"]["answer_accuracy"] = 0.40
    assert [f.name for f in evaluation_warnings(value)] == ["DPO lost answer accuracy"]
    # What an evaluation said of it itself, now or in an earlier version, is not said twice.
    (one,) = evaluation_warnings(value)
    value["warnings"] = [one.line, "collapse: DPO lost right answers, 80% -> 40%", "another"]
    assert [f.text for f in evaluation_warnings(value)] == ["another", one.text]
    # Where the same questions are asked of both, their differences say more than two samples do.
    value["models"]["dpo"]["differences"] = {"answer_accuracy": {"previous": [-0.45, 0.30]}}
    value["warnings"] = []
    assert evaluation_warnings(value) == []


@pytest.mark.parametrize(
    ("answer_length", "fall", "collapsed"),
    [(400, 30.0, False), (400, 110.0, True), (4, 1.9, False), (4, 2.1, True), (40, 11.0, True)],
)
def test_stage_and_page_call_the_same_a_collapse(
    answer_length: int, fall: float, collapsed: bool
) -> None:
    """A long answer of 400 nats may fall by 30, a short one of 4 by 1.9."""
    beta = 0.1
    line = {
        "logps/chosen": -answer_length - fall,
        "rewards/chosen": -beta * fall,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
    }
    from tandem.stages.dpo import _warnings as stage_warnings

    said = stage_warnings([line] * 8, beta)
    assert bool(said) is collapsed
    assert said == [text for text in [chosen_collapse([line] * 8, beta)] if text]


def test_right_answers_that_did_not_end_are_counted_apart(tmp_path: Path) -> None:
    value = evaluation()
    value["models"]["sft"] |= {"answer_accuracy": 0.0, "right_cut": 0.75, "stop_rate": 0.0}
    value["models"]["dpo"]["right_cut"] = 0.0
    titles = [measure.title for measure in shown_measures(value)]
    assert titles[:2] == ["answer accuracy", "right text, cut"]
    found = {f.name: f for f in evaluation_warnings(value)}
    one = found["SFT gives right answers that do not end"]
    assert one.level == "warning"
    assert one.text.startswith("90 of 120 answers have the right text and did not end")
    folder = run_folder(tmp_path / "run")
    write(folder / "6-evaluation" / "evaluation.json", value)
    text = page_of(folder).text
    assert "right text, cut" in text
    assert "90 of 120 answers" in text
    # Where no model has one, nothing is said.
    value["models"]["sft"]["right_cut"] = 0.0
    assert "right text, cut" not in [measure.title for measure in shown_measures(value)]


def test_what_the_page_warns_of_is_printed_at_the_end_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", fall=9.0)
    _finish(folder, evaluation())
    printed = " ".join(capsys.readouterr().out.split())
    found = run_warnings(read_run(folder))
    assert found
    for one in found:
        assert f"{one.level}: {one.line}" in printed
        assert one.text in page_of(folder).text


def test_how_several_processes_shared_the_work(tmp_path: Path) -> None:
    sft_stage(tmp_path)
    found = dict(tiles(read_run(tmp_path).stages[0]))
    assert found["micro-batches"] == "87% full"
    assert found["engine"] == "deepspeed-zero2, 2 processes"
    assert found["busiest process"] == "2.3% above the mean"
    assert found["time by its estimate"] == "1.27x"
    assert "memory by its estimate" not in found


def test_held_out_scores_stand_beside_the_training_curve(tmp_path: Path) -> None:
    sft_stage(tmp_path / "scored", scored=True)
    sft_stage(tmp_path / "plain")
    scored, plain = (write_report(tmp_path / name).read_text() for name in ("scored", "plain"))
    assert "held-out loss 0.520, step 80" in scored
    assert "held-out" not in plain
    found = dict(tiles(read_run(tmp_path / "scored").stages[0]))
    assert found["held-out records"] == "80"
    assert found["held-out loss"] == "3.61 → 0.58"
    assert found["kept"] == "step 80, best loss"
    assert found["stopped early"] == "step 120 of 400"
    assert "stopped early" not in dict(tiles(read_run(tmp_path / "plain").stages[0]))


def test_each_data_set_has_a_line_of_its_own(tmp_path: Path) -> None:
    sft_stage(tmp_path / "run")
    for name, start in (("metrics", "loss_of/"), ("validation", "eval_loss_of/")):
        steps = [{"step": n, "loss": 2.0, f"{start}<a>": 3.0 - n, f"{start}b": 1.5} for n in (1, 2)]
        write_lines(tmp_path / "run" / f"{name}.jsonl", [*steps, {"step": 3, f"{start}b": 0.5}])
    page = write_report(tmp_path / "run").read_text()
    for title in ("Loss by data set", "Held-out loss by data set"):
        chart = page.partition(f"<h3>{title}</h3>")[2].partition("</figure>")[0]
        assert "&lt;a&gt; 1.000, step 2" in chart
        assert "b 0.500, step 3" in chart
    plain = tmp_path / "plain"
    sft_stage(plain)
    assert "by data set" not in write_report(plain).read_text()
