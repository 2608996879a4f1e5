"""Numbers as text, the terminal's table, and the model card."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tandem import wording
from tandem.report.model_card import write_card
from tandem.report.result_rows import compared_rows, result_rows, task_notes
from tandem.report.terminal_tables import (
    comparison_notes,
    comparison_table,
    result_table,
    samples_table,
)

from .made_runs import NASTY, evaluation, measured_evaluation, run_folder


def printed(item: object, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(item)
    return out.getvalue()


def test_numbers() -> None:
    assert [wording.number(x) for x in (0.69314, 12.345, 1e-4, 0, 120, None)] == [
        "0.693", "12.35", "1.00e-4", "0", "120", "–",
    ]  # fmt: skip
    assert wording.number(math.nan) == "–"
    # The learning rates of an axis stay apart.
    assert [wording.number(x, 3) for x in (0.0015, 0.002, 0.0245)] == ["0.0015", "0.0020", "0.02"]
    assert [wording.duration(s) for s in (0.25, 12.34, 185, 7800, 273_600)] == [
        "250 ms", "12.3 s", "3 min 05 s", "2 h 10 min", "3 d 04 h",
    ]  # fmt: skip
    assert [wording.short_count(n) for n in (950, 12859, 1_250_000, 4e16)] == [
        "950", "12.9k", "1.25M", "40P",
    ]  # fmt: skip
    assert wording.size(812_646_400) == "775 MiB"
    assert wording.percent(0.825) == "82.5 %"


def test_rows_change_and_verdict() -> None:
    base, sft, dpo = result_rows(evaluation())
    assert (base.label, sft.label, dpo.label) == ("base", "SFT", "DPO")
    assert base.cells[0].note == "as completion 95.8 %"
    assert (sft.cells[0].arrow, sft.cells[0].change, sft.cells[0].verdict) == ("▲", "+80.8", "good")
    assert (sft.cells[1].arrow, sft.cells[1].verdict) == ("▼", "good")  # a lower loss
    assert (dpo.cells[1].change, dpo.cells[1].verdict) == ("+0.043", "bad")
    assert dpo.cells[5].verdict == ""  # shorter is neither


def test_rows_skip_what_was_not_measured() -> None:
    value = {"models": {"base": {"loss": 2.0}, "sft": {"loss": None}, "dpo": {"loss": 1.5}}}
    rows = result_rows(value)
    assert [r.cells[0].text for r in rows] == ["2.000", "–", "1.500"]
    assert rows[2].cells[0].change == "−0.500"
    assert result_rows({}) == []


def test_terminal_tables_do_not_read_markup() -> None:
    text = printed(result_table(evaluation()))
    assert "as completion 95.8 %" in text
    assert "▲ +27.3" in text
    samples = printed(samples_table(evaluation()), width=300)
    assert "[bold]not markup[/bold]" in samples
    assert "(nothing)" in samples
    rows = len(evaluation()["samples"])
    for most in (0, rows - 1, rows):
        assert samples_table(evaluation(), most).row_count == most
    assert "\x1b" not in text + samples


def test_compared_rows_say_what_is_clear() -> None:
    rows = {row.measure.key: row for row in compared_rows(measured_evaluation(), "previous")}
    task = rows["task:arc_easy"]
    assert task.details == "acc_norm, 5-shot, 500 items"
    assert [cell.text for cell in task.cells] == ["40.0 % ± 2.0", "46.0 % ± 2.0", "46.5 % ± 2.0"]
    assert [cell.change for cell in task.cells] == ["", "+6.0 ± 1.0", "+0.5 ± 0.4"]
    # Half a point with an error of 0.4 is noise.
    assert [cell.verdict for cell in task.cells] == ["", "good", ""]
    loss = rows["loss"].cells[1]
    assert (loss.change, loss.arrow, loss.verdict) == ("−2.50 ± 0.02", "▼", "good")
    first = {row.measure.key: row for row in compared_rows(measured_evaluation(), "first")}
    assert first["task:arc_easy"].cells[2].change == "+6.5 ± 1.2"
    assert first["task:arc_easy"].cells[2].verdict == "good"


def test_what_a_reader_of_scores_must_know() -> None:
    assert task_notes(measured_evaluation()) == [
        f"ARC-easy: local data: {NASTY}",
        "ARC-easy: requests cut to the model's context at their beginning (sft 3)",
        "ARC-easy: only the first 500 items",
        "MMLU was not measured: no such files",
    ]
    text = printed(comparison_table(measured_evaluation()), width=160)
    assert "46.5 % ± 2.0" in text
    assert "▲ +6.5 ± 1.2" in text
    said = comparison_notes(measured_evaluation())[0]
    assert said.endswith("Changes are from base, item by item, shares in percentage points.")


def test_the_card_has_the_tasks(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "demo")
    (run / "6-evaluation" / "evaluation.json").write_text(json.dumps(measured_evaluation()))
    text = write_card(run, run / "5-final").read_text(encoding="utf-8")
    for expected in (
        "| task | base | SFT | DPO |",
        "| ARC-easy (acc_norm, 5-shot, 500 items) | 40.0 % ± 2.0 | 46.0 % ± 2.0 |",
        "- MMLU was not measured: no such files.",
    ):
        assert expected in text, expected
    assert "<script>" not in text


def test_card(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "demo", fall=9.0)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        recipe.replace("path: demo:instructions", "path: Open-Orca/SlimOrca")
        .replace("model: demo:base", "model: some/base")
        .replace("path: demo:prompts", f"path: {tmp_path}/secret/prompts.jsonl")
    )
    text = write_card(run, run / "5-final").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "some/base"
    assert header["datasets"] == ["Open-Orca/SlimOrca"]
    for expected in (
        "| optimizer | lion |", "| learning rate | 0.001 |", "rank 16, alpha 64.0",
        "| DPO | 84.2 % |", "model weights",
        "collapse of the chosen log-probs", "`prompts.jsonl`", "## Limits",
    ):  # fmt: skip
        assert expected in text, expected
    assert str(tmp_path) not in text


def test_card_says_that_the_base_was_quantised(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    file = run / "1-sft" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization": "nf4"}))
    text = write_card(run, run / "5-final").read_text(encoding="utf-8")
    assert text.count("The base was in 4 bits (nf4)") == 1


@pytest.mark.parametrize("model", ["demo:base", "/abs/model", "./base"])
def test_card_header_names_only_hub_models(tmp_path: Path, model: str) -> None:
    run = run_folder(tmp_path / "demo", until="sft")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model: demo:base", f"model: {model}"))
    text = write_card(run, run / "out").read_text(encoding="utf-8")
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "has not evaluated" in text
    assert "/abs" not in text
