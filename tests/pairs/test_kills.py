"""Killed at random moments, making pairs loses nothing and repeats nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tandem.storage.atomic_files import read_jsonl

from ..stages.made_inputs import WORDS, make_model_folder
from .badly_behaved import Desk, asked, badly_behaved
from .forks import Forks

MODEL_KILLS, SERVER_KILLS = 4, 4
PROMPTS = 80


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_model_folder(home / "model")
    with (home / "prompts.jsonl").open("w") as file:
        for i in range(PROMPTS):
            question = f"say {WORDS[i % 10]} {i}" + " please" * (i % 5)
            row = {"prompt": question, "completion": " ".join(WORDS[: 1 + i % 7])}
            file.write(json.dumps(row) + "\n")
    return home


@pytest.fixture(scope="module")
def forks(home: Path) -> Forks:
    return Forks(home)


def recorded(folder: Path, name: str = "pairs") -> dict[int, Any]:
    """What is in a journal, each number once."""
    found: dict[int, Any] = {}
    for line in read_jsonl(folder / "generated" / f"{name}.jsonl")[1:]:
        for number, value in line["unit"]:
            assert number not in found
            found[number] = value
    return found


def journal_size(folder: Path) -> int:
    path = folder / "generated" / "pairs.jsonl"
    return path.stat().st_size if path.exists() else 0


def test_a_model_that_is_killed_ends_with_the_same_bytes(home: Path, forks: Forks) -> None:
    command = ("pairs", "--prompts", "prompts.jsonl", "--model", "model", "samples=8",
               "max_new_tokens=12", "top_p=0.9", "filters.max_similarity=0.9")  # fmt: skip
    whole = forks.run(*command, "--output_dir", "whole")
    assert whole.code == 0, whole.said
    assert sorted(whole.generated) == list(range(PROMPTS * 8))
    draw, folder, kills = random.Random(7), home / "killed", 0
    full = journal_size(home / "whole")
    while kills < MODEL_KILLS:
        before = recorded(folder)
        size = journal_size(folder)
        # Somewhere from the start of the command to a little after the next batch or so.
        goal = size + draw.choice((0, 0, 1, 1, 1, full // 20))
        done = forks.run(
            *command, "--output_dir", "killed",
            kill=lambda goal=goal: journal_size(folder) >= max(goal, 1), after=draw.random() * 0.03,
        )  # fmt: skip
        assert not before.keys() & set(done.generated)
        after = recorded(folder)
        assert before.items() <= after.items()
        kills += done.killed
        if not done.killed:  # it was quicker; once more from the start
            assert done.code == 0, done.said
            shutil.rmtree(folder)
    done = forks.run(*command, "--output_dir", "killed")
    assert done.code == 0, done.said
    for name in ("pairs.jsonl", "generated/pairs.jsonl", "data-ledger.jsonl"):
        assert (folder / name).read_bytes() == (home / "whole" / name).read_bytes(), name
    assert len(recorded(folder)) == PROMPTS * 8
    assert not list(folder.rglob(".*"))


def test_a_servers_recorded_answers_are_not_asked_for_again(home: Path, forks: Forks) -> None:
    with badly_behaved() as desk:
        desk.delay = 0.004
        desk.plan = {"*": [*[None] * 30, 500, *[None] * 20, "cut", *[None] * 20, 429]}
        _kill_again_and_again(home, forks, desk)


def _kill_again_and_again(home: Path, forks: Forks, desk: Desk) -> None:
    number = iter(range(10**6))
    desk.answer = lambda body: f"answer {next(number)} to {asked(body)}"
    command = ("pairs", "--prompts", "prompts.jsonl", "--output_dir", "served",
               f"server.base_url={desk.url}", "server.model=m", "server.concurrency=3")  # fmt: skip
    draw, folder, kills = random.Random(11), home / "served", 0
    questions = [row["prompt"] for row in read_jsonl(home / "prompts.jsonl")]
    while kills < SERVER_KILLS:
        before, seen = recorded(folder), len(desk.bodies)
        goal = len(before) + draw.randrange(PROMPTS // SERVER_KILLS)
        done = forks.run(
            *command,
            kill=lambda goal=goal: len(recorded(folder)) >= goal and journal_size(folder) > 0,
            after=draw.random() * 0.02,
        )
        known = {questions[n] for n in before}
        assert not known & {asked(body) for body in desk.bodies[seen:]}
        assert before.items() <= recorded(folder).items()
        kills += done.killed
        if not done.killed:
            assert done.code == 0, done.said
            shutil.rmtree(folder)
    done = forks.run(*command)
    assert done.code == 0, done.said
    answers = recorded(folder)
    assert sorted(answers) == list(range(PROMPTS))
    rows = read_jsonl(folder / "pairs.jsonl")
    assert [row["rejected"] for row in rows] == [answers[n][0] for n in range(PROMPTS)]
    assert all(row["rejected"].endswith(row["question"]) for row in rows)
