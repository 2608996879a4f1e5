"""The honest anchor: a straightforward loop of transformers and peft, completion rows only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.data.encoded.example import Branch, Example

from .work import (
    ADAPTERS,
    BETA,
    CHOSEN_WEIGHT,
    LEARNING_RATE,
    SEED,
    Ran,
    Stage,
    Work,
    trained_tokens,
)


def load_model(work: Work) -> Any:
    """The model in the benchmark's dtype with transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=work.dtype, attn_implementation="sdpa"
    )
    return model.to(work.device)


def lora_config(stage: Stage) -> LoraConfig:
    """The benchmark's adapter, for the peers."""
    adapter = ADAPTERS[stage]
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=list(adapter.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def run_plain(work: Work, trees: Sequence[Example]) -> Ran:
    """One epoch in micro-batches of `work.size` records.

    Records that are alone are not padded: a pair's answers go through the model one after the
    other. Otherwise all sequences of a micro-batch are padded to the longest, under a mask.
    """
    torch.manual_seed(SEED)
    model = get_peft_model(load_model(work), lora_config(work.stage))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    autocast = torch.autocast(work.device, torch.bfloat16, enabled=work.device == "cuda")
    _wait(work)
    began = time.perf_counter()
    with autocast:
        reference = _reference(model, trees, work) if work.stage == "dpo" else []
    _wait(work)
    between = time.perf_counter()
    first: list[tuple[Tensor, Tensor]] = []  # losses, and log-probs by record
    model.train()
    for start in range(0, len(trees), work.batch_size):
        step = range(start, min(start + work.batch_size, len(trees)))
        targets = trained_tokens([trees[i] for i in step])
        for at in range(step.start, step.stop, work.size):
            batch = range(at, min(at + work.size, step.stop))
            with autocast:
                logps = _logps(model, [trees[i] for i in batch], work)
            if work.stage == "dpo":
                loss = _pair_losses(logps, torch.stack([reference[i] for i in batch])).sum()
                loss = loss / len(step)
            else:
                loss = -logps.sum() / targets
            loss.backward()  # type: ignore[no-untyped-call]
            if not start:
                weights = logps.new_tensor(
                    [CHOSEN_WEIGHT, 1.0] if work.stage == "dpo" else [1.0] * logps.shape[1]
                )
                first.append((loss.detach(), logps.detach() @ weights))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(work)
    ended = time.perf_counter()
    sums = torch.cat([records for _, records in first]).double().cumsum(0).tolist()
    means = [total / trained_tokens(trees[: i + 1]) for i, total in enumerate(sums)]
    return Ran(
        loop_seconds=ended - between,
        reference_seconds=between - began,
        first_records=len(means),
        first_loss=float(sum(loss for loss, _ in first)),
        first_logp=means[-1],
        logps=tuple(means),
        bfloat16=work.device == "cuda",
    )


def _reference(model: Any, trees: Sequence[Example], work: Work) -> list[Tensor]:
    with torch.no_grad(), model.disable_adapter():
        batches = (trees[i : i + work.size] for i in range(0, len(trees), work.size))
        return [row for batch in batches for row in _logps(model, batch, work)]


def _pair_losses(policy: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (policy - reference).unbind(1)
    return -F.logsigmoid(BETA * (chosen - rejected))


def _logps(model: Any, trees: Sequence[Example], work: Work) -> Tensor:
    """Log-probabilities of the sequences' trained tokens [records, branches]."""
    branches = len(trees[0].branches)
    sequences = [tree.sequence(branch) for tree in trees for branch in range(branches)]
    if len(trees) == 1:
        logps = torch.cat([_sequence_logps(model, [one], work) for one in sequences])
    else:
        logps = _sequence_logps(model, sequences, work)
    return logps.view(len(trees), branches)


def _sequence_logps(model: Any, sequences: Sequence[Branch], work: Work) -> Tensor:
    """Log-probabilities of padded sequences [S]; rows that predict nothing skip the head."""
    causal = model.get_base_model()
    longest = max(len(s.input_ids) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    trained = torch.zeros(ids.shape, dtype=torch.bool)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        ids[row, :length] = torch.from_numpy(sequence.input_ids.astype("int64"))
        trained[row, :length] = torch.from_numpy(sequence.trained)
        mask[row, :length] = 1
    ids, trained, mask = (tensor.to(work.device) for tensor in (ids, trained[:, 1:], mask))
    hidden = causal.get_decoder()(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1] if len(sequences) > 1 else None,
        use_cache=False,
    ).last_hidden_state
    logits = causal.lm_head(hidden[trained]).float()
    tokens = -F.cross_entropy(logits, ids[:, 1:][trained], reduction="none")
    return tokens.new_zeros(len(sequences)).index_add(0, trained.nonzero()[:, 0], tokens)


def _wait(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()
