"""A folder with a tiny model and data, and the question that every test of this folder asks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.main import main


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, files with the hash of their content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


class Desk:
    """Commands on a tiny model, sound unless a test spoils something.

    `model`, `conversations` and `pairs` are the sound inputs, `home` is where everything lies.
    """

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self.capsys = capsys
        self.model = home / "model"
        self.conversations = home / "conversations.jsonl"
        self.pairs = home / "pairs.jsonl"

    def train(self, stage: str = "sft", **changes: Any) -> list[str]:
        """The command line of a training stage; None leaves a flag out."""
        flags = {
            "model_name_or_path": self.model,
            "dataset_name": self.conversations if stage == "sft" else self.pairs,
            "output_dir": self.home / "out",
            "max_length": 200,
            "max_prompt_length": 150,
            "max_steps": 2,
            "batch_size": 4,
        } | changes
        given = [(f"--{name}", str(value)) for name, value in flags.items() if value is not None]
        return [stage, *(text for pair in given for text in pair)]

    def merge(self, base: Path, adapter: Path, output: str = "merged") -> list[str]:
        """The command line of a merge."""
        names = ("--base-model-path", "--lora-model-path", "--output-path")
        values = (base, adapter, self.home / output)
        pairs = zip(names, map(str, values), strict=True)
        return ["merge", *(text for pair in pairs for text in pair)]

    def recipe(self, **changes: Any) -> str:
        """A recipe file; `sft__max_steps=3` changes a key of a section, None takes it out."""
        stage = {"batch_size": 4, "max_steps": 2, "max_length": 200}
        data: dict[str, Any] = {
            "name": "desk",
            "model": str(self.model),
            "output_dir": str(self.home / "run"),
            "sft": {"data": str(self.conversations), **stage},
            "dpo": {"data": str(self.pairs), **stage},
        }
        for key, value in changes.items():
            *above, last = key.split("__")
            section = data
            for name in above:
                section = section.setdefault(name, {})
            section[last] = value
        return self.text(yaml.safe_dump(data), "recipe.yaml")

    def text(self, text: str, name: str) -> str:
        """A file with this text; its path."""
        path = self.home / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def accepted(self, argv: list[str]) -> str:
        """Run a command that must succeed; what it said on stderr."""
        code = main(argv)
        said = self.capsys.readouterr().err
        assert code == 0, said
        return said

    def stopped(self, argv: list[str], *needles: str) -> str:
        """Run a command that must end with one message, which has every needle in it."""
        code = main(argv)
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        assert code == 2, captured.err
        assert captured.err.count("error: ") == 1
        message = captured.err[captured.err.index("error: ") :]
        for needle in needles:
            assert needle in message, f"{needle!r} is not in: {message}"
        return message

    def refused(self, argv: list[str], *needles: str) -> str:
        """`stopped`, with nothing written anywhere."""
        before = tree(self.home)
        message = self.stopped(argv, *needles)
        assert tree(self.home) == before
        return message
