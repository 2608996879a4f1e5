"""A merged folder says what base and adapter say, loads anywhere, and is refused otherwise."""

from __future__ import annotations

import re
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tandem.errors import UserError
from tandem.model import layer_walk, merge_sums
from tandem.model.layer_walk import walk
from tandem.model.load_model import load_adapter
from tandem.model.lora.adapter_folder import LowRankUpdate, read_updates
from tandem.model.merge_weights import MergedShards, WeightPair
from tandem.model.model_folder import load_config, model_without_weights
from tandem.model.shard_writer import ShardWriter
from tandem.model.verify_merge import whole_models
from tandem.runtime.device import Device
from tandem.stages.merge import run_merge
from tandem.storage import hashing
from tandem.storage.atomic_files import read_json
from tandem.storage.hashing import hash_file
from tests.jobs import merge_job

from .made_inputs import QUIET, make_model_folder
from .test_training_stages import run


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "sft"
    run("sft", tiny_model, folder)
    return folder


def merged(base: Path, adapter: Path, output: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"dtype": "auto", "force": False, "device": "cpu"} | changes
    return run_merge(merge_job(base, adapter, output, **options), QUIET)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_equals_pefts_own_merge_and_generates(
    tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = load(merged(tiny_model, trained, tmp_path / "out"))
    theirs = load_adapter(load(tiny_model), trained).merge_and_unload()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = ours.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert output.shape[1] > ids["input_ids"].shape[1]
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["logp_difference"] < 1e-5 < summary["adapter_effect"]
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_base_is_hashed_once(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it takes as long as the merge itself where it has billions of parameters."""
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(hashing, "hash_file", counted)
    merged(tiny_model, trained, tmp_path / "out")
    assert hashed.count(tiny_model / "model.safetensors") == 1


def test_shards_stay_shards(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    sharded = make_model_folder(tmp_path / "base")
    load(tiny_model).save_pretrained(str(sharded), max_shard_size="20KB")
    (sharded / "model.safetensors").unlink()
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(shards) > 3
    whole = merged(tiny_model, trained, tmp_path / "whole")
    parts = merged(sharded, trained, tmp_path / "parts", force=True)
    assert sorted(p.name for p in parts.glob("*.safetensors")) == shards
    for name, weight in load(whole).state_dict().items():
        assert torch.equal(load(parts).state_dict()[name], weight)


def test_the_stated_dtype_is_cast_to_once(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    folder = merged(tiny_model, trained, tmp_path / "out", dtype="bfloat16")
    exact = load_file(merged(tiny_model, trained, tmp_path / "exact") / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16))
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert load(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("fault", ["forgotten", "doubled", "one weight"])
def test_a_corrupted_merge_is_refused_and_leaves_nothing(
    fault: str, tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sums' own check passes over, the log-probs show."""
    plain = merge_sums.low_rank_sum
    count = 0

    def wrong(
        weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        nonlocal count
        count += 1
        factor = {"forgotten": 0, "doubled": 2, "one weight": int(count > 1)}[fault]
        return plain(weight, a, b, scale * factor)

    monkeypatch.setattr(merge_sums, "low_rank_sum", wrong)
    if fault != "one weight":  # whose effect may be small
        monkeypatch.setattr(merge_sums, "_is_sum", lambda *_: True)
    with pytest.raises(UserError, match="does not compute what base and adapter do"):
        merged(tiny_model, trained, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_layer_by_layer_the_models_say_what_they_say_whole(
    tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    """And of the base no weight is in memory before its layer is called, and none after."""
    folder = merged(tiny_model, trained, tmp_path / "out")
    config, probes = load_config(tiny_model), [[5, 6, 7, 8, 9, 10], [11, 12, 13, 20], [4, 9]]
    model = model_without_weights(config)
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    (tmp_path / "again").mkdir()
    taken: list[str] = []
    with MergedShards(
        tiny_model, read_updates(trained), tmp_path / "again", model=model, dtype=None
    ) as shards:

        def take(name: str) -> WeightPair | None:
            taken.append(name)
            return shards.weight(name)

        found = walk(config, trained, probes, take, **options)
        shards.finish()
    expected = whole_models(tiny_model, trained, folder, probes, **options)
    for name in ("base", "adapted", "merged"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    layers = [name.split(".")[2] for name in taken if ".layers." in name]
    assert layers == sorted(layers)
    assert len(taken) == len(set(taken)) == len(model.state_dict())
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_model_that_cannot_be_walked_is_compared_whole_or_by_its_tensors(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_walk, "layers_of", lambda _: [])
    console = Console(file=StringIO(), width=300)
    run_merge(merge_job(tiny_model, trained, tmp_path / "whole", device="cpu"), console)
    monkeypatch.setattr(Device, "free_memory", lambda _: 1000)
    job = merge_job(tiny_model, trained, tmp_path / "tensors", device="cpu")
    run_merge(job, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    why = "the layers of LlamaForCausalLM are not known"
    assert f"checked whole, not layer by layer ({why})" in said
    assert f"checked tensor by tensor, not layer by layer ({why}; whole it takes 0.0 GB" in said
    assert "weights, each the sum of base and adapter" in said
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("whole", "tensors")]
    assert [one["checked"] for one in summaries] == ["whole", "tensor by tensor"]
    assert summaries[1]["logp_difference"] is None


@pytest.mark.parametrize("compiled", [True, False], ids=["C", "torch"])
def test_a_sum_that_is_a_hundredth_wrong_is_noticed(
    compiled: bool, tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, delta = merge_sums.low_rank_sum, LowRankUpdate.delta
    monkeypatch.setattr(LowRankUpdate, "delta", lambda self: delta(self) * 1.01)
    monkeypatch.setattr(
        merge_sums,
        "low_rank_sum",
        lambda weight, a, b, scale: plain(weight, a, b, scale * 1.01) if compiled else None,
    )
    with pytest.raises(UserError, match="is not the sum of the base's weight and the adapter's"):
        merged(tiny_model, trained, tmp_path / "wrong")


def test_a_disk_that_does_not_keep_what_is_written_is_noticed(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ShardWriter.write

    def write(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "model.norm.weight":
            tensor = tensor.clone()
            tensor.view(torch.uint8)[5] ^= 1
        plain(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(UserError, match=r"did not keep the bytes of model\.norm\.weight"):
        merged(tiny_model, trained, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_too_large_for_the_disk_is_said_before_anything_is_written(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 4000, free=4000)
    monkeypatch.setattr("tandem.model.merge_weights.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(ShardWriter, "__init__", lambda *_: pytest.fail("it was written"))
    with pytest.raises(UserError, match=r"takes 0\.0 GB, and the disk of .* has 0\.0 GB free"):
        merged(tiny_model, trained, tmp_path / "out")


def test_the_wrong_base_is_refused_unless_forced(
    tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    other = make_model_folder(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on other weights"):
        merged(other, trained, tmp_path / "out")
    merged(other, trained, tmp_path / "out", force=True)


def test_a_template_may_be_chosen(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = merged(tiny_model, trained, tmp_path / "out", chat_template="chatml")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(str(folder)).chat_template


@pytest.mark.parametrize("damage", ["missing", "cut", "of another shape"])
def test_a_damaged_shard_is_named_before_anything_is_written(
    damage: str, tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    load(tiny_model).save_pretrained(base, max_shard_size="20KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    name, tensor = next(iter(load_file(shard).items()))
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        turned = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
        save_file({**load_file(shard), name: turned}, shard, metadata={"format": "pt"})
    monkeypatch.setattr(ShardWriter, "__init__", lambda *_: pytest.fail("it was written"))
    named = name if damage == "of another shape" else shard.name
    with pytest.raises(UserError, match=re.escape(named)):
        merged(base, trained, tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_cannot_be_merged_is_named(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no adapter folder"):
        merged(tiny_model, tiny_model, tmp_path / "a")
    with pytest.raises(UserError, match="holds an adapter, not a whole model"):
        merged(trained, trained, tmp_path / "b")
    stray = tmp_path / "stray"
    stray.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (stray / file).write_bytes((trained / file).read_bytes())
    tensors = load_file(stray / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): t for name, t in tensors.items()}
    save_file(renamed, stray / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"no weight named model\.layers\.7"):
        merged(tiny_model, stray, tmp_path / "c")
    save_file({**tensors, "odd": torch.zeros(1)}, stray / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no LoRA update"):
        merged(tiny_model, stray, tmp_path / "d")
