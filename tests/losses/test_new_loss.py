"""The page of losses is current, and the example of a new loss does what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.losses import paired
from tandem.losses.docs_page import losses_page, shipped
from tandem.losses.registry import PREFERENCE_LOSSES
from tandem.recipe.dpo_settings import DpoSettings
from tandem.train.objectives.mixture import Mixture

from .test_losses import BETA, BY_HAND, CHOSEN, REJECTED, answer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _losses_of_before() -> Iterator[None]:
    before = dict(PREFERENCE_LOSSES)
    yield
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


def test_the_page_of_losses_is_current() -> None:
    page = ROOT / "docs" / "guide" / "losses.md"
    advice = "run: python -m tandem.losses.docs_page > docs/guide/losses.md"
    assert page.read_text(encoding="utf-8") == losses_page(), advice
    assert all(loss.about is not None and loss.source for loss in shipped())


def test_the_example_of_a_new_loss_needs_one_file_and_its_test() -> None:
    """The code of CONTRIBUTING.md, run at the end of the file that it is written into."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    loss, case = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with pytest.raises(ValueError, match="there is no loss 'squared'"):
        DpoSettings(loss="squared")
    exec(compile(loss, paired.__file__, "exec"), vars(paired))
    cases: dict[str, Any] = eval(f"{{{case}}}")
    options, expected = cases["squared"]
    assert cases.keys().isdisjoint(BY_HAND)
    settings = DpoSettings(loss="squared", beta=BETA, **options)
    value, _ = Mixture.of(settings).losses(answer(*CHOSEN), answer(*REJECTED))
    assert value.item() == pytest.approx(expected, abs=1e-14)
    assert (
        "| `squared` | (1 - β Δ)² | Where the margin should stay near a target. |" in losses_page()
    )
