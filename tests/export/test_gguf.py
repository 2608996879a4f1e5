"""A file is compared with the model: what is planted in it is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import tandem.export.write_gguf
from tandem.errors import UserError
from tandem.export.choices import ExportJob
from tandem.export.compare_weights import compare_logps, compare_tensors
from tandem.export.export_gguf import check_gguf, export_gguf
from tandem.export.families import Layout
from tandem.export.formats import FORMATS, error_bound, rounded, unpacked
from tandem.export.gguf_file import GgufFile
from tandem.model.model_folder import model_without_weights, read_config

from .made_models import make_model
from .planted import changed_copy, plant_rows, plant_text, plant_value


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_within_its_rounding(
    name: Any, stories_path: Path, tmp_path: Path, console: Console
) -> None:
    """A real pretrained model; the bits of its rounding, and log-probs as near as they let it."""
    file = tmp_path / "stories.gguf"
    export_gguf(ExportJob(str(stories_path), file, name, "neural-chat"), console)
    compared = check_gguf(file, str(stories_path), "neural-chat", console)
    assert compared.weights.exact == sum(compared.weights.formats.values())
    assert compared.weights.from_rounded < 2e-4
    most = {"f32": 2e-4, "f16": 0.05, "bf16": 0.5, "q8_0": 1.0}[name]
    least = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}[name]
    assert least <= compared.weights.from_model < most
    assert compared.weights.kl < 1e-2
    # Rows of 172 numbers cannot be cut into blocks of 32.
    assert ("5 tensors are f16" in said(console)) == (name == "q8_0")


def test_the_default_is_the_format_of_the_weights(exported: Path) -> None:
    formats = GgufFile(exported).formats
    assert {kind for name, kind in formats.items() if "norm" not in name} == {"BF16"}
    assert {kind for name, kind in formats.items() if "norm" in name} == {"F32"}


def test_rounding_and_reading_are_gguf_s_own_to_the_bit() -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    torch.manual_seed(3)
    values = torch.randn(40, 96) * torch.logspace(-9, 2, 40)[:, None]
    values[7] = 0.0
    for name in ("F32", "F16", "BF16", "Q8_0"):
        kind = GGMLQuantizationType[name]
        packed = quantize(values.numpy(), kind)
        theirs = torch.from_numpy(np.array(dequantize(packed, kind)))
        assert torch.equal(unpacked(torch.from_numpy(np.array(packed)), name), theirs), name
        ours, bound = rounded(values, name), error_bound(values, name)
        assert ours is not None
        assert bound is not None
        assert torch.equal(ours, theirs), name
        assert bool(((ours - values).abs() <= bound).all()), name
        if name != "F32":  # and no bound that explains anything
            assert not bool(((ours - values).abs() <= bound / 4).all()), name


def test_weights_in_transformers_order_are_refused(
    exported: Path, merged: Path, tmp_path: Path, console: Console
) -> None:
    copy, reader = changed_copy(exported, tmp_path)
    heads, size = 4, 64
    order = np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1)
    plant_rows(reader, "blk.2.attn_q.weight", order)
    with pytest.raises(UserError, match=r"blk\.2\.attn_q\.weight is not .* transformers' order"):
        check_gguf(copy, str(merged), None, console)


def test_the_forward_of_the_file_alone_finds_what_the_inverse_would_not(
    exported: Path, merged: Path, tmp_path: Path
) -> None:
    """Were writing and reading back wrong in the same way, tensors would agree."""
    copy, reader = changed_copy(exported, tmp_path)
    order = np.arange(256).reshape(4, 32, 2).swapaxes(1, 2).reshape(-1)
    plant_rows(reader, "blk.2.attn_q.weight", order)
    model = model_without_weights(read_config(merged))
    ids = [[1, *range(40, 60)]]
    with pytest.raises(UserError, match="does not compute what the model does"):
        compare_logps(GgufFile(copy), merged, model, ids)
    assert compare_logps(GgufFile(exported), merged, model, ids)[0] < 1e-4


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.rope.freq_base", 9000.0, "rope.freq_base"),
        ("llama.attention.layer_norm_rms_epsilon", 1e-3, "layer_norm_rms_epsilon"),
        ("tokenizer.ggml.eos_token_id", 1, r"end token is 1 \('<s>'\), the model's 2"),
        ("tokenizer.ggml.add_bos_token", False, "other tokens by the file's chat template"),
    ],
)
def test_a_wrong_value_is_refused(
    key: str, value: float, named: str, exported: Path, merged: Path, tmp_path: Path,
    console: Console,
) -> None:  # fmt: skip
    copy, reader = changed_copy(exported, tmp_path)
    plant_value(reader, key, value)
    if key.endswith("add_bos_token"):
        # What renders a BOS itself gets it either way, so that the template must not, either.
        plant_text(reader, "tokenizer.chat_template", b"bos_token or ''", b"          ''   ")
    with pytest.raises(UserError, match=named):
        check_gguf(copy, str(merged), None, console)


def test_a_wrong_template_is_refused(
    exported: Path, merged: Path, tmp_path: Path, console: Console
) -> None:
    copy, reader = changed_copy(exported, tmp_path)
    plant_text(reader, "tokenizer.chat_template", b"'<|assistant|>", b"'<|assistent|>")
    with pytest.raises(UserError, match=r"conversation \(user\) has other tokens by the file's"):
        check_gguf(copy, str(merged), None, console)


def test_a_file_that_came_out_wrong_is_not_kept(
    merged: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tandem.export.write_gguf, "layout_of", lambda *_: Layout())
    with pytest.raises(UserError, match="transformers' order"):
        export_gguf(ExportJob(str(merged), tmp_path / "out" / "model.gguf"), console)
    assert list((tmp_path / "out").iterdir()) == []


def test_formats_of_few_bits_are_compared_by_their_size(
    exported: Path, merged: Path, tmp_path: Path, console: Console
) -> None:
    """A file that llama.cpp has quantised, here to Q4_0 by gguf: close enough, and a wrong one."""
    few = tmp_path / "few.gguf"
    _requantized(exported, few)
    compared = check_gguf(few, str(merged), None, console)
    assert compared.weights.formats["Q4_0"] == 28
    assert compared.weights.exact < 12
    assert compared.weights.from_rounded < 1e-3 < compared.weights.from_model
    copy, reader = changed_copy(few, tmp_path)
    plant_rows(reader, "blk.1.ffn_up.weight", np.arange(512)[::-1])
    model = model_without_weights(read_config(merged))
    with pytest.raises(UserError, match=r"ffn_up\.weight is not the model's weight.*16% in Q4_0"):
        compare_tensors(GgufFile(copy), merged, model)


def _requantized(file: Path, output: Path) -> None:
    """Write a file again with the matrices of its layers in 4 bits."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

    reader = GGUFReader(file)
    writer = GGUFWriter(output, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        of_array = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], of_array)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType.F32
        if values.ndim == 2 and tensor.name != "token_embd.weight":
            kind = GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_numbers_beyond_f16_are_refused(tmp_path: Path, console: Console) -> None:
    from safetensors.torch import load_file, save_file

    source = make_model(tmp_path / "model", "qwen2")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"ffn_up.weight has the number 9.984e\+04.*--type bf16"):
        export_gguf(ExportJob(str(source), tmp_path / "x.gguf", "f16"), console)
    export_gguf(ExportJob(str(source), tmp_path / "x.gguf"), console)


def test_a_cut_file_is_named(
    exported: Path, merged: Path, tmp_path: Path, console: Console
) -> None:
    cut = tmp_path / "cut.gguf"
    shutil.copyfile(exported, cut)
    with cut.open("r+b") as file:
        file.truncate(exported.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cut\.gguf is no whole GGUF file"):
        check_gguf(cut, str(merged), None, console)
