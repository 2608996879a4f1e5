"""Tiny models, prepared as runs prepare them, and what each is made of, as plain values.

`python -m tests.model.prepared` writes them to `prepared.json` anew: for a change that is meant to
change them, which the commit message then says.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.model.load_model import load_adapter, load_base, load_model
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import FOR_TRAINING, Preparation, prepare_model
from tandem.model.trained_weights import trainable_parameters
from tandem.recipe.training_settings import LoraSettings

from ..stages.made_inputs import make_model_folder

FILE = Path(__file__).parent / "prepared.json"
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and how it is prepared."""

    config: Any
    attention: str = "segments"
    added: int = 0
    dropout: float = 0.0
    drops: bool = False
    targets: Any = "all-linear"
    compiled: bool = False
    recomputed: bool = False
    reordered: bool = False
    quantization: str | None = None


CASES = {
    "llama, dropout": Case(LlamaConfig(**_SIZES), reordered=True, dropout=0.1, drops=True),
    "tied, compiled, checkpointed": Case(
        LlamaConfig(**_SIZES, tie_word_embeddings=True),
        "dense", compiled=True, recomputed=True, dropout=0.1,
    ),
    "llama, added tokens": Case(LlamaConfig(**_SIZES), added=2),
    "tied, added tokens, ordered": Case(
        LlamaConfig(**_SIZES, tie_word_embeddings=True), added=2, reordered=True
    ),
    "gpt2": Case(
        GPT2Config(
            n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
        ),
        targets=("c_attn",),
    ),
    "mixture, padded": Case(
        MixtralConfig(**_SIZES, num_local_experts=2), "padded", dropout=0.1, drops=True
    ),
    "llama, nf4": Case(LlamaConfig(**_SIZES), quantization="nf4"),
}  # fmt: skip


def prepared(case: Case, root: Path) -> dict[str, Any]:
    """What a prepared model says and is made of, and what its saved adapter makes of its base.

    Args:
        case: the model and how it is prepared.
        root: an empty folder.
    """
    folder = make_model_folder(root / "model", config=case.config)
    model = load_model(folder, dtype=torch.float32, quantization=case.quantization)
    rows = model.get_input_embeddings().weight.shape[0]
    new = {f"<t{i}>": rows + i for i in range(case.added)}
    lora = LoraSettings(rank=2, alpha=4, dropout=case.dropout, target_modules=case.targets)
    weights = LoraWeights(lora, seed=3, base="base", dropout=case.drops)
    log: list[str] = []
    preparation = Preparation(
        added=AddedTokens(new, {"</s>": 1}) if new else None,
        attention=case.attention,
        weights=weights,
        compiled=case.compiled,
        recomputed=case.recomputed,
        reordered=case.reordered,
    )
    model = prepare_model(model, FOR_TRAINING, preparation, log.append)
    (root / "adapter").mkdir()
    weights.save(model, root / "adapter", trainable_parameters(model))
    base = load_base(folder, root / "adapter", dtype=torch.float32)
    saved = load_adapter(base, root / "adapter")
    return {"log": log, "trained": describe(model), "saved": describe(saved)}


def describe(model: nn.Module) -> dict[str, list[str]]:
    """Modules' classes, forwards, parameters and tandem's attributes, with the modules' names.

    A forward that was replaced is written as what hands on to what, the newest first. peft's empty
    containers are left out.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        parts = [type(module).__name__]
        if "forward" in module.__dict__:
            parts.append("forward: " + " > ".join(_chain(module.__dict__["forward"])))
        marks = {key: value for key, value in vars(module).items() if key.startswith("tandem_")}
        parts += [f"{key}: {_value(value)}" for key, value in sorted(marks.items())]
        parts += [
            f"{key}: {list(p.shape)} {str(p.dtype)[6:]}{' trained' if p.requires_grad else ''}"
            for key, p in module.named_parameters(recurse=False)
        ]
        if parts not in (["ModuleDict"], ["ParameterDict"]):
            found.setdefault("; ".join(parts), []).append(name)
    return found


def _value(value: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


def _chain(forward: Any) -> list[str]:
    """The names of a replaced forward and of those that it may hand on to."""
    if (compiled := getattr(forward, "_torchdynamo_orig_callable", None)) is not None:
        return [f"compiled {compiled.__name__}"]
    if isinstance(forward, partial):
        names, inner = [forward.func.__name__], list(forward.args)
    else:
        names = [getattr(forward, "__qualname__", type(forward).__name__)]
        inner = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    inner = [one for one in inner if callable(one) and not isinstance(one, nn.Module | Tensor)]
    return names + [name for one in inner for name in _chain(one)]


if __name__ == "__main__":
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = prepared(case, Path(scratch))
    FILE.write_text(json.dumps(found, indent=1) + "\n")
