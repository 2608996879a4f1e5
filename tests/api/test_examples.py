"""Every example of the page on Python runs as it stands, and does what the page says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem.cli.main import main

from ..docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "guide" / "python.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to work in, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("notebook")
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("WORLD_SIZE", raising=False)
        yield folder


@pytest.fixture(scope="module")
def names(place: Path) -> dict[str, Any]:
    """What the page's examples define, one after the other in one module, as a notebook's cells."""
    source = "\n".join(block.text for block in blocks(PAGE, "python"))
    module = place / "cells.py"
    module.write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        import cells  # type: ignore[import-not-found]

    return vars(cells)


def test_the_first_run_is_one_run(names: dict[str, Any], place: Path) -> None:
    sft, dpo, final = (names[name] for name in ("sft", "dpo", "final"))
    assert [one.folder for one in (sft, dpo, final)] == [
        Path("runs/first", stage) for stage in ("1-sft", "4-dpo", "5-final")
    ]
    assert (sft.model, dpo.model, final.model) == (None, None, Path("runs/first/5-final"))
    assert (sft.adapter, final.adapter) == (Path("runs/first/1-sft"), Path("runs/first/4-dpo"))
    assert sft.metrics[-1]["step"] == sft.summary["steps"] == 4
    assert dpo.metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert sft.merge() == sft.merge().merge()
    assert final.merge() is final
    assert sft.settings.lora == tandem.LoRA(rank=16, alpha=32)


def test_the_command_line_finds_its_stages_finished(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = (b.text for b in blocks(PAGE, "") if b.text.startswith("tandem"))
    assert main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().err
    finished = re.findall(r"(\S+) is finished with these inputs", said)
    assert [Path(folder).name for folder in finished] == ["1-sft", "2-sft-merged", "4-dpo"]
    assert tandem.run("my-recipe.yaml", until="dpo", quiet=True).stages["dpo"] == names["dpo"]


def test_rows_and_weights_are_what_the_page_says(names: dict[str, Any]) -> None:
    mixture = names["mixed"].summary["mixture"]
    assert [(one["records"], one["weight"]) for one in mixture] == [(660, 0.1), (20, 1.0)]
    assert mixture[1]["path"].startswith("runs/demo-base-sft-instructions-")
    assert names["found"].trains
    assert "24 records read as dpo would" in names["found"].text


def test_a_loss_of_ones_own_is_the_built_in_one_to_the_bit(names: dict[str, Any]) -> None:
    weights = "adapter_model.safetensors"
    mine, theirs = names["mine"].folder / weights, names["dpo"].folder / weights
    assert mine.read_bytes() == theirs.read_bytes()
    assert names["mine"].recipe.dpo.loss == "cells:my_sigmoid"


def test_evaluations_plans_and_runs_have_their_figures(names: dict[str, Any]) -> None:
    scores = names["scores"]
    assert list(scores) == ["sft", "dpo"]
    assert scores["dpo"]["preference_margin"] > scores["sft"]["preference_margin"]
    assert "preference accuracy" in repr(scores)
    assert "<th>dpo</th>" in scores._repr_html_().lower()
    run = names["run"]
    assert list(run.stages) == ["sft", "sft-merge"]
    assert run.final.settings.lora.rank == 8
    assert (run.final.summary["checked"], run.evaluation) is not None
    assert run.stages["sft"].summary["steps"] == 3
    assert "steps" in repr(names["planned"])
    assert (Path(run) / "report.html").exists()


def test_a_stopped_run_is_resumed_to_the_same_metrics(names: dict[str, Any]) -> None:
    assert names["seen"] == [line["loss"] for line in names["resumed"].metrics[:2]]


def test_results_show_themselves(names: dict[str, Any], place: Path) -> None:
    page = names["dpo"]._repr_html_()
    assert page.count("&lt;svg ") == 2
    assert '<td style="text-align:left">runs/first/4-dpo</td>' in page
    assert repr(names["dpo"]).startswith("<dpo runs/first/4-dpo: steps 3, examples 24, ")
    report = names["final"].report()
    assert Path(report) == Path("runs/first/report.html")
    assert "Reward margin" in report._repr_html_()
    saved = names["final"].save("mine")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in saved.iterdir()
    }
    assert not {"manifest.json", "summary.json"} & {path.name for path in saved.iterdir()}
    assert names["final"].save("mine") == saved
    with pytest.raises(tandem.UserError, match="mine is there, and not a copy"):
        names["sft"].save("mine")
