"""The page: complete for a whole run, partial for a part of one, safe against what models say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.report.facts import read_run
from tandem.report.findings import evaluation_findings, find
from tandem.report.html import write_report
from tandem.report.training import tiles

from .made_runs import (
    NASTY,
    dpo_stage,
    evaluation,
    measured_evaluation,
    run_folder,
    sft_stage,
    write,
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


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_folder_that_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_collapse_is_named(tmp_path: Path) -> None:
    found = find(read_run(run_folder(tmp_path / "bad", fall=9.0)))
    assert [f.name for f in found] == ["collapse of the chosen log-probs"]
    assert "−" not in found[0].text
    assert find(read_run(run_folder(tmp_path / "good", fall=0.4))) == []


def test_training_that_names_the_collapse_is_not_repeated(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "bad", fall=9.0)
    summary = json.loads((folder / "4-dpo" / "summary.json").read_text())
    summary["warnings"] = ["collapse: the chosen log-probs fell by 8 nats"]
    write(folder / "4-dpo" / "summary.json", summary)
    assert len(find(read_run(folder))) == 1


def test_loss_of_accuracy_beyond_chance_is_named() -> None:
    value = evaluation()
    value["models"]["dpo"]["answer_accuracy"] = 0.80  # 3 questions of 120: chance
    assert evaluation_findings(value) == []
    value["models"]["dpo"]["answer_accuracy"] = 0.40
    assert [f.name for f in evaluation_findings(value)] == ["DPO lost answer accuracy"]
    value["warnings"] = ["collapse: DPO lost right answers"]
    assert [f.text for f in evaluation_findings(value)] == value["warnings"]


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
