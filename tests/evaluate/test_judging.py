"""`tandem eval --judge` against a local server: troubles, the key, a command that is repeated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json
from tests.pairs.badly_behaved import KEY, Desk, badly_behaved


@pytest.fixture
def desk() -> Iterator[Desk]:
    with badly_behaved() as desk:
        yield desk


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    code = main(["eval", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def command(stories_path: Path, tmp_path: Path, desk: Desk) -> list[Any]:
    other = tmp_path / "other"
    other.mkdir()
    for file in stories_path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    asked = tmp_path / "q.jsonl"
    rows = ({"question": f"Tell me of {w}.", "answer": "No.", "accepted": ["no"]}
            for w in ("cats", "dogs", "birds"))  # fmt: skip
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        stories_path, other, "--questions", asked, "--max_new_tokens", 4, "--device", "cpu",
        "--chat_template", "neural-chat", "--output_dir", tmp_path / "out",
        "--judge", "wise", "--judge_url", desk.url,
    ]  # fmt: skip


def differ(folder: Path) -> None:
    """Make the second model another one: its embedding upside down."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "embed" in n)
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_judge_on_a_server(
    command: list[Any],
    desk: Desk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    differ(tmp_path / "other")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    desk.answer = lambda body: "[[C]]"
    desk.plan["*"] = [500, "garbage"]
    code, out, err = run(capsys, *command, "--judge-key-variable", "JUDGE_KEY")
    assert code == 0, err
    assert "win rate" in out
    assert "wise on other against stories260K: 0 won, 3 tied, 0 lost" in out
    assert {h["Authorization"] for h in desk.headers} == {f"Bearer {KEY}"}
    assert len(desk.bodies) == 8  # six, and two again
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert found["judge"]["models"]["other"]["unread"] == 0
    written = [p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(KEY in text for text in [*written, out, err])
    # With another sample count it is another evaluation, and nobody is asked again.
    code, _, err = run(capsys, *command, "--judge-key-variable", "JUDGE_KEY", "--samples", 1)
    assert code == 0, err
    assert len(desk.bodies) == 8


def test_a_refusal_is_counted(
    command: list[Any], desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differ(tmp_path / "other")
    desk.answer = lambda body: "[[A]]" if "cats" in str(body) else "I would rather not say."
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "2 without a verdict" in out
    assert "other: 2 of 3 questions have no verdict of wise" in err
    # The same command asks again, and for what is missing alone.
    desk.answer = lambda body: "[[B]]"
    desk.plan["*"] = [400]
    asked = len(desk.bodies)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert len(desk.bodies) == asked + 4
    assert "1 without a verdict" in out
    assert "wise gave no answer to 1 requests (HTTP 400: 1); the first: HTTP 400: status 400" in err
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert len(desk.bodies) == asked + 5
    assert "without a verdict" not in out
    # By now there is nothing to ask.
    assert run(capsys, *command) == (0, out, err.splitlines(keepends=True)[0])
    assert len(desk.bodies) == asked + 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--judge", "x"], "a judge needs both --judge, its name on the server, and --judge_url"),
        (["--judge_key_variable", "X"], "name --judge and --judge_url"),
        (["--judge", "x", "--judge_url", "nonsense"], "--judge_url: this is no address"),
        (
            ["--judge", "x", "--judge_url", "http://h/v1", "--judge_key_variable", "sk-1"],
            "--judge_key_variable: this is no name",
        ),
    ],
)
def test_half_a_judge(
    flags: list[str], said: str, stories_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, stories_path, "--questions", "q.jsonl", *flags)
    assert code == 2
    assert said in err
    assert "sk-1" not in err
