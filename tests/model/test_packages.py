"""A package that an engine needs and that is not there."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from tandem.errors import UserError, require

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_a_missing_package_is_named_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("torch", "deepspeed", "engine: deepspeed-zero2")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError) as caught:
        require("deepspeed", "deepspeed", "engine: deepspeed-zero2")
    said = str(caught.value)
    assert "engine: deepspeed-zero2 needs the package deepspeed, which is not installed" in said
    assert "pip install '.[deepspeed]'" in said
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("deepspeed") for line in extras["deepspeed"])
