"""The honest anchor: transformers and peft, one record at a time, completion rows only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.data.records import Branch, Tree

from .work import ALPHA, BETA, LEARNING_RATE, RANK, SEED, TARGETS, Stage


def load_model(folder: str) -> Any:
    """The model in float32 with transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def lora_config() -> LoraConfig:
    """The benchmark's adapter, for the peers."""
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
    )


def run_plain(
    stage: Stage, folder: str, trees: Sequence[Tree], batch_size: int
) -> tuple[float, float]:
    """One epoch; returns the seconds of the loop and of the reference pass."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_model(folder), lora_config())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    began = time.perf_counter()
    reference = _reference(model, trees) if stage == "dpo" else []
    between = time.perf_counter()
    model.train()
    for start in range(0, len(trees), batch_size):
        step = range(start, min(start + batch_size, len(trees)))
        targets = sum(int(trees[i].sequence(0).trained.sum()) for i in step)
        for i in step:
            if stage == "dpo":
                loss = _pair_loss(model, trees[i], reference[i]) / len(step)
            else:
                loss = -_logp(model, trees[i].sequence(0)) / targets
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - between, between - began


def _reference(model: Any, trees: Sequence[Tree]) -> list[list[Tensor]]:
    with torch.no_grad(), model.disable_adapter():
        return [[_logp(model, tree.sequence(branch)) for branch in (0, 1)] for tree in trees]


def _pair_loss(model: Any, tree: Tree, reference: list[Tensor]) -> Tensor:
    chosen, rejected = (_logp(model, tree.sequence(b)) - reference[b] for b in (0, 1))
    return -F.logsigmoid(BETA * (chosen - rejected))


def _logp(model: Any, sequence: Branch) -> Tensor:
    """Log-probability of the trained tokens; no other row meets the head."""
    causal = model.get_base_model()
    ids = torch.from_numpy(sequence.input_ids.astype("int64"))
    hidden = causal.get_decoder()(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
    rows = torch.from_numpy(sequence.trained[1:])
    return -F.cross_entropy(causal.lm_head(hidden[rows]), ids[1:][rows], reduction="sum")
