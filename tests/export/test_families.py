"""Every family's file computes what the model does, also by another reader of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.export.choices import ExportJob
from tandem.export.export_gguf import export_gguf
from tandem.export.families import settings_of
from tandem.export.gguf_file import GgufFile
from tandem.model.model_folder import read_config

from .made_models import FAMILIES, make_model

_IDS = torch.tensor([[1, 40, 700, 33, 5, 912, 61, 1500, 8, 77, 300, 12, 9, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_the_model_does(family: str, tmp_path: Path, console: Console) -> None:
    """Exporting compares with a forward of the file alone; transformers reads it here besides.

    transformers' reader loses what a file says of positions, so it gets the configuration. It does
    not know SmolLM3, and takes Mistral for Llama.
    """
    source = make_model(tmp_path / "model", family)
    file = export_gguf(ExportJob(str(source), tmp_path / "out.gguf"), console)
    if family == "smollm3":
        return
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = {} if family == "mistral" else {"config": ours.config}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, **config
    )
    with torch.no_grad():
        one, other = (m(input_ids=_IDS).logits.log_softmax(-1) for m in (ours, theirs))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_frequencies_of_llama_3_are_in_the_file(tmp_path: Path, console: Console) -> None:
    """By Meta's rule: as they are, eight times slower, and between the two."""
    source = make_model(tmp_path / "model", "llama")
    factors = GgufFile(export_gguf(ExportJob(str(source), tmp_path / "out.gguf"), console)).tensor(
        "rope_freqs.weight"
    )
    speeds = 500000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    turns = 64 * speeds / (2 * torch.pi)  # in the original context
    smooth = ((turns - 1) / 3).clamp(0, 1)
    wanted = 1 / (smooth + (1 - smooth) / 8)
    torch.testing.assert_close(factors.double(), wanted, rtol=1e-5, atol=0)


def test_a_family_that_is_not_known_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model(tmp_path / "model", "llama", model_type="olmo2", rope_parameters=None)
    assert main(["export", "gguf", str(source), "--output", str(tmp_path / "x.gguf")]) == 2
    said = capsys.readouterr().err
    assert "of a olmo2 model" in said
    assert "gemma3_text, llama, mistral, phi3, qwen2, qwen3, smollm3" in said
    assert "convert_hf_to_gguf.py" in said
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                 "original_max_position_embeddings": 64}},
            "scaled by yarn",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, object], named: str
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**{**FAMILIES[family], **changes})
    with pytest.raises(UserError, match=named):
        settings_of(config)


def test_settings_are_those_of_the_configuration(merged: Path) -> None:
    values = settings_of(read_config(merged))
    assert values["attention.head_count"] == 4
    assert values["attention.key_length"] == 64
    assert values["rope.freq_base"] == 10000.0
