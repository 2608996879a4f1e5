"""A merged model and its GGUF file, which the tests share and do not change."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tandem.export.choices import ExportJob
from tandem.export.export_gguf import export_gguf
from tandem.model.model_folder import model_folder
from tandem.stages.merge import run_merge

from ..evaluate.made_adapters import make_adapter
from ..jobs import merge_job


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the embedded demo's model."""
    return make_adapter(model_folder("demo:base"), tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="session")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That adapter merged, with the template zephyr, as the last stage of a run."""
    folder = tmp_path_factory.mktemp("run") / "5-final"
    quiet = Console(file=io.StringIO())
    return run_merge(merge_job("demo:base", adapter, folder), quiet)


@pytest.fixture(scope="session")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model's file."""
    file = tmp_path_factory.mktemp("exported") / "model.gguf"
    return export_gguf(ExportJob(str(merged), file), Console(file=io.StringIO()))
