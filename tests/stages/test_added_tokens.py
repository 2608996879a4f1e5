"""Special tokens that a model lacks or never learnt: grown, trained, resumed, merged."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tandem.data.batching.collate import collate
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.data.tokenize.vocabulary import add_tokens
from tandem.errors import Stopped, UserError
from tandem.model.added_tokens import grow_vocabulary
from tandem.model.load_model import load_adapter, load_model
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import Preparation, prepare_model, speed_up_adapter
from tandem.recipe.training_settings import LoraSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.merge import run_merge
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer
from tests.jobs import merge_job, training_job

from ..invariants.made import attend
from .made_inputs import QUIET, make_conversations, make_model_folder, make_pairs
from .test_training_stages import distance, settings

CHATML = ("<|im_start|>", "<|im_end|>")


def run(
    kind: str, model: Path, folder: Path, *, runtime: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Tensor]:
    data = folder.parent / f"{kind}.jsonl"
    if not data.exists():
        (make_conversations if kind == "sft" else make_pairs)(data)
    stage: Any = run_sft if kind == "sft" else run_dpo
    run = {
        "chat_template": changes.pop("chat_template", "chatml"),
        "added_tokens": changes.pop("added_tokens", CHATML),
        "tokens_per_microbatch": 4096,
        **(runtime or {}),
    }
    stage(training_job(settings(kind, data, **changes), model, folder, **run), QUIET)
    return load_file(folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    run_merge(merge_job(base, adapter, output), QUIET)
    return load_file(output / "model.safetensors")


def branch(ids: list[int], trained: list[bool]) -> Branch:
    return Branch(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with an untied head, a tied one, and with rows to spare."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    made = {
        "untied": make_model_folder(root / "untied"),
        "tied": make_model_folder(
            root / "tied", config=LlamaConfig(**sizes, tie_word_embeddings=True)
        ),
        "padded": make_model_folder(root / "padded"),
    }
    model = AutoModelForCausalLM.from_pretrained(made["padded"])
    model.resize_token_embeddings(320)
    model.save_pretrained(made["padded"])
    return made


@pytest.mark.parametrize("name", ["untied", "tied", "padded"])
def test_gradients_equal_full_logits_in_float64(name: str, bases: dict[str, Path]) -> None:
    def adapted() -> Any:
        model = load_model(bases[name], dtype=torch.float64)
        count = len(AutoTokenizer.from_pretrained(bases[name]))
        grow_vocabulary(model, [count, count + 1])
        attend(model, "padded" if plain else "segments")
        weights = LoraWeights(LoraSettings(rank=4, alpha=8), base="x")
        wrapped = weights.attach(model, added_ids=[1, count, count + 1])
        return count, prepare_model(wrapped, (speed_up_adapter,), Preparation())

    gradients, losses = [], []
    for plain in (True, False):
        count, model = adapted()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        ids = [count, 7, 1, 30, count + 1, count, 8, 1, count + 1]
        if plain:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logps = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            loss = logps[4:].sum()
        else:
            flags = [position >= 5 for position in range(len(ids))]
            tree = Example(branch([], []), (branch(ids, flags),), Origin("f", 1))
            loss = sequence_logps(model, collate([tree])).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    assert sum("trainable_tokens" in key for key in gradients[0]) == (1 if name == "tied" else 2)
    for key, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["untied", "tied", "padded"])
def test_train_merge_and_align(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, count = bases[name], len(AutoTokenizer.from_pretrained(bases[name]))
    trained = run("sft", base, tmp_path / "sft", max_steps=8)
    rows = [trained[key] for key in sorted(trained, reverse=True) if "trainable_tokens" in key]
    assert len(rows) == (1 if name == "tied" else 2)
    before = load_file(base / "model.safetensors")
    mean = before["model.embed_tokens.weight"][:count].double().mean(0).float()
    assert all(not torch.equal(row[0], row[1]) and (row - mean).abs().max() > 1e-3 for row in rows)
    merged = merge(base, tmp_path / "sft", tmp_path / "merged")
    size = 320 if name == "padded" else count + 2
    for key in merged.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        assert merged[key].shape[0] == size
        assert torch.equal(merged[key][:count], before[key][:count])
    assert torch.equal(merged["model.embed_tokens.weight"][count : count + 2], rows[0])
    assert read_json(tmp_path / "merged" / "config.json")["vocab_size"] == size
    summary = read_json(tmp_path / "merged" / "summary.json")
    assert summary["adapter_effect"] > 0.1
    assert summary["logp_difference"] < 1e-4
    # The second stage finds the tokens, and a run has it add nothing.
    aligned = run(
        "dpo",
        tmp_path / "merged",
        tmp_path / "dpo",
        chat_template=None,
        added_tokens=(),
        max_steps=1,
    )
    assert not [key for key in aligned if "trainable_tokens" in key]


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_tokens_that_the_model_has_are_trained_from_their_own_rows(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """In both embeddings, merged, and through the second stage; nothing else of them moves."""
    base = bases[name]
    known = {"chat_template": "neural-chat", "added_tokens": ("</s>",)}
    trained = run("sft", base, tmp_path / "sft", **known)
    rows = [trained[key] for key in sorted(trained, reverse=True) if "trainable_tokens" in key]
    assert [tuple(row.shape) for row in rows] == [(1, 32)] * (1 if name == "tied" else 2)
    inputs = read_json(tmp_path / "sft" / "manifest.json")["inputs"]["model"]
    assert inputs["trained_tokens"] == {"</s>": 1}
    assert "added_tokens" not in inputs
    with pytest.raises(UserError, match="trained_tokens"):
        run("sft", base, tmp_path / "sft", **known | {"added_tokens": ()})
    before = load_file(base / "model.safetensors")
    merged = merge(base, tmp_path / "sft", tmp_path / "merged")
    matrices = merged.keys() & {"model.embed_tokens.weight", "lm_head.weight"}
    for key in matrices:
        moved = (merged[key] != before[key]).any(dim=1)
        assert moved.nonzero().flatten().tolist() == [1]
    assert torch.equal(merged["model.embed_tokens.weight"][1], rows[0][0])
    assert (rows[0] - before["model.embed_tokens.weight"][1]).abs().max() > 1e-3
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["vocab_size"] == read_json(base / "config.json")["vocab_size"]
    # Asked with the adapter it answers as the merged model does.
    ids = torch.tensor([[0, 5, 1, 7]])
    with torch.no_grad():
        together = load_adapter(load_model(base, dtype=torch.float32), tmp_path / "sft")
        alone = load_model(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(
            together(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-4, rtol=0
        )
    # The reference of DPO is the model as it is, and the rows go on from there.
    aligned = run(
        "dpo", tmp_path / "merged", tmp_path / "dpo", max_steps=1, logging_steps=1, **known
    )
    (line,) = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [key for key in aligned if "trainable_tokens" in key]


def test_a_token_without_a_row_gets_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has rows: naming the token is the way out."""
    shutil.copytree(bases["untied"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    count = len(tokenizer)
    add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=f"name the tokens with the ids {count} to {count} as well"):
        run("sft", tmp_path / "base", tmp_path / "half", added_tokens=("<|im_end|>",), max_steps=1)
    run("sft", tmp_path / "base", tmp_path / "sft", max_steps=2)
    merged = merge(tmp_path / "base", tmp_path / "sft", tmp_path / "merged")
    assert merged["lm_head.weight"].shape[0] == count + 2
    assert read_json(tmp_path / "merged" / "config.json")["vocab_size"] == count + 2


def test_the_schedule_does_not_change_the_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    large = run("sft", bases["tied"], tmp_path / "4096")
    small = run(
        "sft", bases["tied"], tmp_path / "1", runtime={"tokens_per_microbatch": 1},
        gradient_checkpointing=True,
    )  # fmt: skip
    assert distance(small, large) < 5e-5


def test_a_model_in_4_bits_learns_new_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    run("sft", bases["untied"], tmp_path / "sft", runtime={"quantization": "nf4"}, max_steps=2)
    merge(bases["untied"], tmp_path / "sft", tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "summary.json")["logp_difference"] < 1e-4


@pytest.mark.parametrize("name", ["tied"])
def test_the_reference_is_the_model_with_the_mean_rows(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run("dpo", bases[name], tmp_path / "first", max_steps=1, logging_steps=1)
    (line,) = read_jsonl(tmp_path / "first" / "metrics.jsonl")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    run("dpo", bases[name], tmp_path / "dpo")
    count = len(AutoTokenizer.from_pretrained(bases[name]))
    ids = torch.tensor([[count, 5, 7, count + 1]])
    plain = load_model(bases[name], dtype=torch.float32)
    grow_vocabulary(plain, [count, count + 1])
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
        policy = load_adapter(load_model(bases[name], dtype=torch.float32), tmp_path / "dpo")
        assert not torch.allclose(policy(input_ids=ids).logits, wanted, atol=1e-2)
        with LoraWeights(LoraSettings()).reference(policy):
            torch.testing.assert_close(policy(input_ids=ids).logits, wanted)


def test_a_stopped_run_ends_with_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = (*CHATML, "</s>")  # two that it lacks, one that it has
    uninterrupted = run("sft", bases["tied"], tmp_path / "uninterrupted", added_tokens=tokens)
    taken, plain = 0, trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        nonlocal taken
        report = plain(self, step)
        taken += 1
        if taken == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(Stopped):
            run("sft", bases["tied"], tmp_path / "stopped", added_tokens=tokens)
    resumed = run("sft", bases["tied"], tmp_path / "stopped", added_tokens=tokens)
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def test_a_real_model_learns_chatml_and_stops(stories_path: Path, tmp_path: Path) -> None:
    run(
        "sft", stories_path, tmp_path / "sft", learning_rate=2e-2, max_steps=16, max_length=256,
        save_steps=100,
    )  # fmt: skip
    merge(stories_path, tmp_path / "sft", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 514
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=False,
    )  # fmt: skip
    start, end = tokenizer.convert_tokens_to_ids(list(CHATML))
    assert ids[0].tolist().count(start) == 2
    assert ids[0].tolist().count(end) == 1
    answer = model.generate(ids, max_new_tokens=150, do_sample=False, pad_token_id=0)
    assert answer[0, -1] == end  # by generation_config.json alone
    assert answer.shape[1] < ids.shape[1] + 150


@pytest.mark.parametrize("named", [False, True])
def test_a_base_that_never_learnt_its_end_token_learns_to_stop(
    named: bool, stories_path: Path, tmp_path: Path
) -> None:
    """Only with its row trained: frozen, it is one of many equal rows, and a warning says so."""
    adapter = tmp_path / "sft"
    run(
        "sft", stories_path, adapter, learning_rate=1e-2, max_steps=30 if named else 16,
        max_length=256, save_steps=100, chat_template="neural-chat",
        added_tokens=("</s>",) if named else (),
    )  # fmt: skip
    warnings = [w for w in read_json(adapter / "summary.json")["warnings"] if "learn to stop" in w]
    assert len(warnings) == (0 if named else 1)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = load_adapter(load_model(stories_path, dtype=torch.float32), adapter)
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    place = ids[0].tolist().index(2)
    with torch.no_grad():
        probability = float(model(input_ids=ids).logits[0, place - 1].softmax(-1)[2])
    # Frozen, it shares what it gets with 238 others, after however many steps.
    assert probability > 2 / 238 if named else probability < 1 / 238, probability


def test_without_the_key_the_error_says_how(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'added_tokens: \["<\|im_start\|>", "<\|im_end\|>"\]'):
        run("sft", bases["untied"], tmp_path / "sft", added_tokens=())


def test_spread_embeddings_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    try:
        with pytest.raises(UserError, match=r"added_tokens: the engine fsdp2 .* Use `engine: ddp`"):
            run("sft", bases["untied"], tmp_path / "sft", runtime={"engine": "fsdp2"})
    finally:
        torch.distributed.destroy_process_group()
