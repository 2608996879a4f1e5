"""Progress: plain lines in a file, a bar in a terminal, phases counted either way."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tandem.runtime.console import StageProgress, phase


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=140)


def text(one: Console) -> str:
    assert isinstance(one.file, io.StringIO)
    return one.file.getvalue()


def test_plain_lines_for_logged_steps_only() -> None:
    out = console(False)
    with StageProgress(out, "sft", 4) as bar:
        bar.advance(1)
        bar.advance(2, {"loss": 0.69314, "tokens_per_second": 5123.4, "rewards/margins": 0.5})
        bar.advance(4, {"loss": 0.5})
    lines = text(out).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "sft: step 2/4  loss 0.6931  margin 0.500  tokens/s 5,123  0:00 left"
    )
    assert lines[1].startswith("sft: step 4/4  loss 0.5000")
    assert "left" not in lines[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_held_out_scores_have_lines_of_their_own(terminal: bool) -> None:
    out = console(terminal)
    with StageProgress(out, "sft", 4) as bar:
        bar.scored(0, {"step": 0, "eval_loss": 1.25, "eval_rewards/accuracies": 0.5})
        bar.advance(2, {"loss": 0.75})
    assert "held-out loss 1.2500  held-out accuracy 0.50" in text(out)
    if not terminal:
        first, second = text(out).splitlines()
        assert first.startswith("sft: step 0/4  held-out")
        assert "held-out" not in second


def test_terminal_shows_a_bar_from_the_resumed_step() -> None:
    out = console(True)
    with StageProgress(out, "dpo [x]", 10, start_step=5) as bar:
        bar.advance(6, {"loss": 0.25})
    assert "dpo [x]" in text(out)
    assert "6/10" in text(out)
    assert "loss 0.2500" in text(out)


@pytest.mark.parametrize("total", [3, None])
@pytest.mark.parametrize("terminal", [True, False])
def test_phase(terminal: bool, total: int | None) -> None:
    out = console(terminal)
    with phase(out, "reference pass", total) as advance:
        advance(2)
        advance(1)
    assert "reference pass" in text(out)
    assert ("3/3" if total else "3") in text(out)


def test_a_failing_phase_ends_its_display() -> None:
    out = console(False)

    def fail() -> None:
        with phase(out, "encoding", 9) as advance:
            advance(4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "encoding: 4/9" in text(out)
