"""Every stage test has its own cache and a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from .made_inputs import make_model_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that tests share and do not change."""
    return make_model_folder(tmp_path_factory.mktemp("model"))
