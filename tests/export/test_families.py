"""Every family's file computes what the model does, by transformers' own loader as well."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tandem.export.choices import ExportJob
from tandem.export.export_gguf import export_gguf

from .made_models import FAMILIES, make_model

_IDS = torch.tensor([[1, 40, 700, 33, 5, 912, 61, 1500, 8, 77, 300, 12, 9, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_the_model_does(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", family)
    console = Console(file=io.StringIO(), width=200)
    file = export_gguf(ExportJob(str(source), tmp_path / "out.gguf"), console)
    print(console.file.getvalue())
    if family == "smollm3":
        return
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, config=ours.config
    )
    with torch.no_grad():
        one, other = (m(input_ids=_IDS).logits.log_softmax(-1) for m in (ours, theirs))
    print(float((one - other).abs().max()))
    assert float((one - other).abs().max()) < 1e-3
