"""Every kind of adapter is trained by both stages, resumed, loaded by plain peft, and merged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.data.batching.collate import collate
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.errors import UserError
from tandem.model.base_model import check_base
from tandem.model.load_model import load_adapter, load_model
from tandem.model.logprobs.sequence_logps import Scorer, sequence_logps
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.adapter_folder import read_updates
from tandem.model.model_folder import load_config
from tandem.model.prepare_model import Preparation, prepare_model, speed_up_adapter
from tandem.model.unwrap import layers_of
from tandem.plan.model_shape import described
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.merge import run_merge
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import merge_job

from ..invariants.made import attend
from .made_inputs import QUIET, make_model_folder
from .stopped import dying_before
from .test_training_stages import run

# What is set beside rank and alpha.
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {
        "rank_pattern": {r"layers\.1\.mlp\.down_proj": 6, "down_proj": 2},
        "alpha_pattern": {"q_proj|down_proj": 3},
    },
    "plus": {"plus_ratio": 4.0},
    "whole-modules": {"modules_to_save": ("norm", "embed_tokens")},
    "head": {"modules_to_save": ("lm_head",)},
    "dora-whole-linear": {"dora": True, "modules_to_save": ("gate_proj", "model.norm")},
    "pissa": {"init": "pissa"},
    "pissa-fast": {
        "init": "pissa_fast",
        "rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "pissa-dora-plus-dropout": {"init": "pissa", "dora": True, "plus_ratio": 2.0, "dropout": 0.2},
    "dora-rslora-dropout": {"dora": True, "rslora": True, "dropout": 0.2},
}
IDS = torch.tensor([[0, 5, 9, 30, 7, 12, 3, 40]])


def lora(kind: str) -> LoraSettings:
    return LoraSettings(**{"rank": 4, "alpha": 8, **KINDS[kind]})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each kind, trained by SFT, each with a checkpoint after two of four steps."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind) / "sft"
        run("sft", tiny_model, folders[kind], lora=lora(kind))
    return folders


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_and_the_merged_model_compute_the_same(
    kind: str, tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    theirs = logits(PeftModel.from_pretrained(base_model(tiny_model), str(trained[kind])))
    assert (theirs - logits(base_model(tiny_model))).abs().max() > 1e-2
    ours = logits(load_adapter(load_model(tiny_model, dtype=torch.float32), trained[kind]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    run_merge(merge_job(tiny_model, trained[kind], tmp_path / "merged"), QUIET)
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(merged, theirs, rtol=0, atol=1e-5)
    summary = read_json(tmp_path / "merged" / "summary.json")
    assert summary["checked"] == "layer by layer"
    assert summary["logp_difference"] < 1e-5 < summary["adapter_effect"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_with_the_same_bits(
    kind: str,
    tiny_model: Path,
    trained: dict[str, Path],
    tmp_path: Path,
) -> None:
    whole = load_file(trained[kind] / "adapter_model.safetensors")
    with dying_before(3):
        run("sft", tiny_model, tmp_path / "stopped", lora=lora(kind))
    resumed = run("sft", tiny_model, tmp_path / "stopped", lora=lora(kind))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dropout" not in kind])
def test_the_reference_of_dpo_is_the_model_as_it_was(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    run("dpo", tiny_model, tmp_path / "dpo", lora=lora(kind), logging_steps=1)
    first, *_, last = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["loss"] < first["loss"]


def test_dora_trains_on_a_base_in_4_bits(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    run("sft", tiny_model, folder, lora=lora("dora"), runtime={"quantization": "nf4"})
    run_merge(merge_job(tiny_model, folder, tmp_path / "merged"), QUIET)
    assert read_json(tmp_path / "merged" / "summary.json")["logp_difference"] < 1e-4


def test_dora_of_experts_is_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    base = make_model_folder(tmp_path / "base", config=config)
    with pytest.raises(UserError, match=r"lora\.dora: the experts of a mixture"):
        run("sft", base, tmp_path / "sft", lora=lora("dora"))
    assert not (tmp_path / "sft").exists()
    targets = ("q_proj", "v_proj")
    run("sft", base, tmp_path / "sft", lora=LoraSettings(dora=True, target_modules=targets))


def test_a_pattern_sets_rank_and_alpha(trained: dict[str, Path]) -> None:
    """The first that fits decides, and the rest keep theirs; as peft reads the folder."""
    saved = load_file(trained["patterns"] / "adapter_model.safetensors")
    ranks = {name: len(a) for name, a in saved.items() if "lora_A" in name}
    for name, rank in ranks.items():
        down = "down_proj" in name
        assert rank == (6 if "layers.1" in name and down else 2 if down else 4), name
    updates = read_updates(trained["patterns"])
    scalings = {name: update.scaling for name, update in updates.items()}  # type: ignore[union-attr]
    assert scalings["model.layers.1.mlp.down_proj.weight"] == 3 / 6
    assert scalings["model.layers.0.mlp.down_proj.weight"] == 3 / 2
    assert scalings["model.layers.0.self_attn.q_proj.weight"] == 3 / 4
    assert scalings["model.layers.0.self_attn.k_proj.weight"] == 8 / 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"dwn_proj": 2}}, "lora.rank_pattern: 'dwn_proj' fits no adapted layer"),
        ({"alpha_pattern": {"proj": 2}}, "lora.alpha_pattern: 'proj' fits no adapted layer"),
        (
            {"rank_pattern": {"v_proj": 2}, "target_modules": ("q_proj",)},
            "the adapted layers are q_proj, and a pattern is the end of a name",
        ),
        (
            {"rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 3}},
            "decides nothing, because 'q_proj' stands before it",
        ),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(
    settings: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run("sft", tiny_model, tmp_path / "sft", lora=LoraSettings(**settings))
    assert said in str(error.value)
    assert not (tmp_path / "sft").exists()
    section = SftSettings(
        data=(DataSource(path="x"),), max_length=128, lora=LoraSettings(**settings)
    )
    with pytest.raises(UserError) as error:
        check_base(tiny_model, {"sft": section}, weights=True)
    assert str(error.value).startswith("sft.lora.")
    assert said in str(error.value)


def _biased(folder: Path) -> Path:
    """A GPT-2, whose norms have a bias."""
    from transformers import GPT2Config

    return make_model_folder(
        folder, config=GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                  tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip


def test_norms_with_a_bias_are_trained_saved_and_merged(tmp_path: Path) -> None:
    base = _biased(tmp_path / "base")
    lora = LoraSettings(rank=4, modules_to_save=("ln_f", "ln_1"))
    saved = run("sft", base, tmp_path / "sft", lora=lora)
    before = load_file(base / "model.safetensors")
    moved = {name for name in saved if "lora" not in name}
    assert {name.rsplit(".", 1)[-1] for name in moved} == {"weight", "bias"}
    assert len(moved) == 2 * 3
    run_merge(merge_job(base, tmp_path / "sft", tmp_path / "merged"), QUIET)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in moved:
        own = name.removeprefix("base_model.model.")
        own = own if own in merged else own.removeprefix("transformer.")
        assert torch.equal(merged[own], saved[name])
        assert not torch.equal(merged[own], before[own])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ("nrm",)}, "'nrm' fits no module of LlamaForCausalLM; its modules"),
        ({"modules_to_save": ("mlp",)}, "a LlamaMLP, which consists of other modules"),
        (
            {"modules_to_save": ("q_proj",), "target_modules": ("q_proj",)},
            "which gets an adapter as well (lora.target_modules)",
        ),
    ],
    ids=lambda value: "-".join(value["modules_to_save"]) if isinstance(value, dict) else None,
)
def test_a_module_that_cannot_be_trained_as_a_whole_is_refused(
    settings: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run("sft", tiny_model, tmp_path / "sft", lora=LoraSettings(**settings))
    assert str(error.value).startswith("lora.modules_to_save: ")
    assert said in str(error.value)
    assert not (tmp_path / "sft").exists()


def test_tied_embeddings_rows_and_4_bits_are_not_trained_as_a_whole(
    tiny_model: Path, tmp_path: Path
) -> None:
    tied = _biased(tmp_path / "tied")
    rows = {"chat_template": "neural-chat", "added_tokens": ("</s>",)}
    for base, named, runtime, said in (
        (tied, "wte", {}, "whose weight input embedding and output head share"),
        (tiny_model, "embed_tokens", rows, "added_tokens trains rows of both"),
        (tiny_model, "lm_head", rows, "added_tokens trains rows of both"),
        (tiny_model, "o_proj", {"quantization": "nf4"}, "which is in 4 bits"),
    ):
        lora = LoraSettings(modules_to_save=(named,))
        with pytest.raises(UserError, match=said):
            run("sft", base, tmp_path / "sft", lora=lora, runtime=runtime)


def test_whole_modules_get_the_gradients_of_full_logits(tiny_model: Path) -> None:
    """In float64, against the model's own forward with its attention, one sequence at a time."""
    ids, found = [7, 1, 30, 8, 9, 40, 12], []
    for plain in (True, False):
        model = load_model(tiny_model, dtype=torch.float64)
        attend(model, "padded" if plain else "segments")
        lora = LoraSettings(rank=4, modules_to_save=("norm", "embed_tokens", "o_proj", "lm_head"))
        wrapped = LoraWeights(lora).attach(model)
        prepare_model(wrapped, (speed_up_adapter,), Preparation())
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        if plain:
            logps = (
                wrapped(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            )
            loss = logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[3:].sum()
        else:
            empty = np.array([], dtype=np.int32)
            trained = np.arange(len(ids)) >= 4
            example = Example(
                Branch(empty, empty.astype(bool)),
                (Branch(np.array(ids, dtype=np.int32), trained),),
                Origin("f", 1),
            )
            loss = sequence_logps(wrapped, collate([example])).sum()
        loss.backward()
        gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        found.append({"loss": loss.detach(), **gradients})
    assert sum("modules_to_save" in name for name in found[0]) == 5 + 1 + 2 + 1
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=0, atol=1e-9)


def test_whole_modules_begin_as_narrow_ones_that_stay_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.model.load_model._COMFORTABLE", 0.0)
    folder = make_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    model = load_model(folder, dtype=torch.float32)
    lora = LoraSettings(rank=4, modules_to_save=("embed_tokens", "norm", "up_proj"))
    wrapped = LoraWeights(lora).attach(model)
    own = load_file(folder / "model.safetensors")
    copies = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
        for n, p in wrapped.named_parameters()
        if "modules_to_save" in n
    }
    assert len(copies) == 1 + 5 + 2
    assert all(torch.equal(copies[name], own[name].float()) for name in copies)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in copies.values())


def test_a_plan_counts_whole_modules_once(tiny_model: Path) -> None:
    config = load_config(tiny_model)
    plain = described(config, LoraSettings(rank=4), attention="auto").shape
    lora = LoraSettings(rank=4, modules_to_save=("norm", "up_proj"))
    shape = described(config, lora, attention="auto").shape
    whole, taken = 2 * 32 * 48 + 5 * 32, 2 * 4 * (32 + 48)  # its adapters are gone
    assert shape.trained == plain.trained + whole - taken
    assert (shape.parameters, shape.linear) == (plain.parameters, plain.linear)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_rows_of_tokens_that_the_model_has_go_with_every_kind(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A control token and a plain one; peft loads the adapter without resizing anything."""
    from transformers import AutoTokenizer

    runtime = {"chat_template": "neural-chat", "added_tokens": ("</s>", "red")}
    lora = LoraSettings(rank=4, dora=True, plus_ratio=2.0, modules_to_save=("norm",))
    folder = tmp_path / "sft"
    saved = run("sft", tiny_model, folder, lora=lora, runtime=runtime)
    ids = sorted(AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids(["</s>", "red"]))
    config = read_json(folder / "adapter_config.json")["trainable_token_indices"]
    assert config == {"model.embed_tokens": ids, "lm_head": ids}
    before = load_file(tiny_model / "model.safetensors")
    rows = saved["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    assert (rows - before["lm_head.weight"][ids]).abs().max() > 1e-3
    theirs = logits(PeftModel.from_pretrained(base_model(tiny_model), str(folder)))
    run_merge(merge_job(tiny_model, folder, tmp_path / "merged"), QUIET)
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(merged, theirs, rtol=0, atol=1e-5)
    assert len(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]) == len(
        before["lm_head.weight"]
    )


@pytest.fixture
def _another_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_another_precision")
@pytest.mark.parametrize("kind", ["dora", "pissa", "whole-modules", "head"])
def test_in_bfloat16_all_that_is_trained_is_float32(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the base in bfloat16, products under autocast, and activations in bfloat16."""
    base = make_model_folder(tmp_path / "base", dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    plain = Scorer.forward

    def forward(self: Scorer, batch: Any) -> Tensor:
        for layer in layers_of(self.model):
            layer.register_forward_hook(lambda *given: seen.add(given[-1].dtype))
        return plain(self, batch)

    monkeypatch.setattr(Scorer, "forward", forward)
    saved = run(
        "dpo", base, tmp_path / "dpo", lora=lora(kind), logging_steps=1,
        runtime={"dtype": "bfloat16"},
    )  # fmt: skip
    first, *_, last = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=3e-2)
    assert last["loss"] < first["loss"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert seen == {torch.bfloat16}
    run_merge(merge_job(base, tmp_path / "dpo", tmp_path / "merged", dtype="float32"), QUIET)
    assert read_json(tmp_path / "merged" / "summary.json")["logp_difference"] < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"nothing": 2}},
        {"modules_to_save": ("mlp",)},
        {"init": "pissa", "rank": 40},
        {"target_modules": ("nothing",)},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_mistake_is_told_before_the_weights_are_loaded(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("tandem.stages.training.model_setup.load_model", load)
    with pytest.raises(UserError, match=r"^lora\."):
        run("sft", tiny_model, tmp_path / "sft", lora=LoraSettings(**settings))
