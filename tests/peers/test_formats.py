"""TRL's own functions between its types of data set: what they make is read as what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from trl import extract_prompt, unpair_preference_dataset

from tandem.data.ledger import Ledger
from tandem.data.read_records import read_pairs
from tandem.data.records import Preference
from tandem.recipe.data_source import DataSource


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def preferences(shared_data: Path) -> list[dict[str, Any]]:
    """Real pairs as TRL's conversational preference with an explicit prompt."""
    lines = (shared_data / "pairs" / "mixed_pairs.jsonl").read_text().splitlines()[:300]
    return [
        {
            "prompt": [said("user", row["question"])],
            "chosen": [said("assistant", row["chosen"])],
            "rejected": [said("assistant", row["rejected"])],
        }
        for row in map(json.loads, lines)
    ]


def read(path: Path, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The pairs in rows, without their origins, sorted."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger()
    found: list[Preference] = list(read_pairs([DataSource(path=str(path))], ledger))
    assert not ledger.entries
    return sorted((one.prompt[0].content, one.chosen, one.rejected) for one in found)


def test_unpaired_rows_meet_again(preferences: list[dict[str, Any]], tmp_path: Path) -> None:
    disable_progress_bars()
    unpaired = unpair_preference_dataset(Dataset.from_list(preferences))
    assert len(unpaired) == 2 * len(preferences)
    expected = read(tmp_path / "paired.jsonl", preferences)
    assert read(tmp_path / "unpaired.jsonl", list(unpaired)) == expected


def test_implicit_prompts_are_what_trl_extracts(
    preferences: list[dict[str, Any]], tmp_path: Path
) -> None:
    implicit = [
        {key: [*row["prompt"], *row[key]] for key in ("chosen", "rejected")} for row in preferences
    ]
    assert read(tmp_path / "implicit.jsonl", implicit) == read(
        tmp_path / "explicit.jsonl", [extract_prompt(row) for row in implicit]
    )
