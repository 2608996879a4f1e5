"""The tutorial notebook: committed clean, and executed as it stands on the embedded model."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json

from ..docs.pages import ROOT, Block, commands
from ..warm.python import python

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"
# What a reader would put into SETTINGS; the cells are those of the file.
SHORTENED = {
    "sft.batch_size": 8,
    "sft.epochs": 0.02,
    "pairs.select.count": 10,
    "pairs.max_new_tokens": 4,
    "dpo.batch_size": 8,
    "dpo.epochs": 1,
    "evaluate.limit": 4,
    "evaluate.max_new_tokens": 4,
}

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ABSOLUTE = re.compile(r"(?<![\w.~/<])/[a-z]+/")


def _read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def _sources(kind: str) -> list[str]:
    return [cell.source for cell in _read().cells if cell.cell_type == kind]


def test_it_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    nbformat.validate(notebook)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
    text = "\n".join(cell.source for cell in _read().cells)
    assert _ABSOLUTE.findall(text) == []
    assert [cell.id for cell in _read().cells if len(cell.source.splitlines()) > 40] == []


def test_its_links_lead_somewhere() -> None:
    links = [link for source in _sources("markdown") for link in _LINK.findall(source)]
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


def test_the_commands_for_the_readers_own_data_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    shown = [
        words
        for source in _sources("markdown")
        for text in re.findall(r"^```sh\n(.*?)^```$", source, flags=re.MULTILINE | re.DOTALL)
        for words in commands(Block(NOTEBOOK, "sh", text))
    ]
    assert [words[:2] for words in shown] == [
        ["tandem", verb] for verb in ("sft", "merge", "dpo", "merge", "chat")
    ]
    for _, verb, *rest in shown:
        code = main([verb, *rest, "--dry-run" if verb in ("sft", "dpo") else "--help"])
        assert code == 0, capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook is executed."""
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def outputs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each code cell printed or showed, by the cell's id, all cells run in a row."""
    jupyter = tmp_path_factory.mktemp("jupyter")
    spec = {
        "argv": [python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (jupyter / "kernels" / "python3").mkdir(parents=True)
    (jupyter / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    notebook = _read()
    with pytest.MonkeyPatch.context() as patch:
        # Jupyter and IPython have folders in the user's home unless these say otherwise.
        patch.setenv("JUPYTER_PATH", str(jupyter))
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(jupyter / name.lower()))
        patch.setenv("XDG_CACHE_HOME", str(jupyter / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", path)
        patch.setenv("SETTINGS", json.dumps(SHORTENED))
        patch.delenv("WORLD_SIZE", raising=False)
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    return {
        cell.id: "\n".join(_text(output) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def _text(output: Any) -> str:
    if output.output_type == "stream":
        assert output.name == "stdout", output.text
        return str(output.text)
    return str(output.data.get("text/html") or output.data["text/plain"])


def test_the_data_and_what_is_trained_of_it(outputs: dict[str, str]) -> None:
    assert outputs["instructions"].startswith("660 conversations")
    assert "assistant: " in outputs["instructions"]
    shown = re.search(r"<pre>(.*)<mark>(.*)</mark></pre>", outputs["trained"], flags=re.DOTALL)
    assert shown is not None
    assert shown.group(1).endswith("### Assistant:\n")
    assert shown.group(2).endswith("&lt;/s&gt;")


def test_every_stage_ran_once(outputs: dict[str, str], folder: Path) -> None:
    assert outputs["dry-run"].splitlines()[0] == "# stages"
    assert len(outputs["dry-run"].splitlines()) == 7
    assert "sft: 660 of 660 records to train on" in outputs["run-sft"]
    assert "1-sft is finished with these inputs" in outputs["run-dpo"]
    assert re.search(r"merge: \d+ weights, log-probs within \S+ nats", outputs["run-dpo"])
    assert re.search(r"pairs: \d+ pairs from \d+ prompts", outputs["run-dpo"])
    finished = re.findall(r"(\S+) is finished with these inputs", outputs["run-evaluate"])
    assert [Path(stage).name for stage in finished] == ["1-sft", "2-sft-merged", "3-pairs", "4-dpo"]
    for model in ("2-sft-merged", "5-final"):
        assert (folder / "runs" / "tutorial" / model / "model.safetensors").stat().st_size > 10**6


def test_what_it_shows_of_training(outputs: dict[str, str]) -> None:
    assert outputs["sft-curve"].count("&lt;svg ") == 2
    assert outputs["dpo-curves"].count("&lt;svg ") == 2
    counts = ast.literal_eval(outputs["records"].splitlines()[0])
    assert counts == {"read": 660, "trained": 660, "truncated": 0, "dropped": 0}
    assert "first step: loss 0.693147, and ln 2 is 0.693147" in outputs["first-step"]
    rows = [line.split() for line in outputs["first-step"].splitlines()[3:]]
    assert len(rows) >= 2
    assert float(rows[0][2]) == 0
    assert float(rows[-1][2]) > 0
    pairs = re.findall(r"question: .+\n +chosen: .+\n +rejected: .*", outputs["show-pairs"])
    assert len(pairs) == 3


def test_the_models_answer_side_by_side(outputs: dict[str, str]) -> None:
    heads = ("demo:base", "1-sft"), ("demo:base", "2-sft-merged", "5-final")
    for cell, models in zip(("chat-sft", "chat-all"), heads, strict=True):
        lines = outputs[cell].splitlines()
        where = [lines.index(model) for model in models]
        assert where == sorted(where)
        assert all(any(lines[at + 1 : at + 4]) for at in where)


def test_the_evaluation_and_the_report(outputs: dict[str, str], folder: Path) -> None:
    run = folder / "runs" / "tutorial"
    for model in read_json(run / "6-evaluation" / "evaluation.json")["models"].values():
        assert f"{model['answer_accuracy']:6.1%} right" in outputs["tokens"]
    assert "as completion" in outputs["run-evaluate"]
    assert "runs/tutorial/report.html" in outputs["run-evaluate"]
    assert "<iframe srcdoc=" in outputs["show-report"]
    assert "Answers side by side" in outputs["show-report"]
    assert "Answers side by side" in (run / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]
