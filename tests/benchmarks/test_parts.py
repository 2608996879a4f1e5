"""The ablation's machinery on a model so small that its figures mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import parts
from tandem.model.cpu import onednn_linear
from tandem.model.logprobs import output_head


def test_all_forms_find_the_same_log_probs(files: list[str], tmp_path: Path) -> None:
    ours = [option for option in files if not option.startswith("--conversations")]
    before = (onednn_linear._AVAILABLE, output_head._ROWS, output_head.Head.blocks)
    page = parts.main([*ours, "--size=1", "--pairs=3", "--repeats=1", "--save"])
    assert (tmp_path / "results" / "parts.md").read_text() == page
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        *parts.FORMS,
        "budget",
        "one pair a micro-batch",
        *(f"{tokens} tokens a micro-batch" for tokens in (512, 1024, 4096)),
    ]
    assert (onednn_linear._AVAILABLE, output_head._ROWS, output_head.Head.blocks) == before


def test_a_form_that_computes_something_else_ends_the_run(
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doubled(*arguments: Any) -> Any:
        return 2 * onednn_linear.product(*arguments)

    monkeypatch.setitem(parts.FORMS, "as shipped", ())
    monkeypatch.setitem(parts.FORMS, "wrong", ((output_head, "product", doubled),))
    ours = [option for option in files if not option.startswith("--conversations")]
    with pytest.raises(SystemExit, match="wrong: log-probs add up to"):
        parts.main([*ours, "--size=1", "--pairs=3", "--repeats=1"])
