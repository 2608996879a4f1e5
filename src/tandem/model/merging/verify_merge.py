"""Does a merged model say what base and adapter say together?"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.model.added_tokens import make_missing_rows
from tandem.model.load_model import load_base, load_model
from tandem.model.lora.adapter import added_ids_of_folder, load_adapter
from tandem.model.quantize import read_record

# Mean absolute difference of a token's log-prob that the stored dtype explains.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MAX_TOKENS = 256


@dataclass(frozen=True)
class Verified:
    """Mean absolute differences of token log-probs on the probe texts, in nats.

    `difference` is between the merged model and base + adapter, `effect` between base + adapter
    and the base alone: what a merge that did nothing would differ by.
    """

    difference: float
    effect: float
    tokens: int

    @property
    def lossy(self) -> bool:
        """Whether rounding took a noticeable part of what the adapter had learnt."""
        return self.difference > max(0.2 * self.effect, 1e-4)


def verify_merge(
    base: Path,
    adapter: Path,
    merged: Path,
    probes: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Verified:
    """Compare token log-probs of the merged model with base + adapter; one is loaded at a time.

    The base is quantised here where it was in training.

    Args:
        base, adapter, merged: model folders.
        probes: token ids of the probe texts.
        dtype: the merged weights' own; it bounds the difference allowed.
        device: where to compute, in float32 on CPU.

    Raises UserError when they differ by more than `dtype` explains.
    """
    compute = torch.float32 if device.type == "cpu" and dtype != torch.float64 else dtype
    record = read_record(adapter)
    # A base that was rounded from bfloat16 was bfloat16 again wherever the adapter saw it.
    formats = {dtype, record.torch_dtype} if record else {dtype}
    plain = load_base(base, adapter, dtype=compute, device=device)
    make_missing_rows(plain, added_ids_of_folder(adapter))
    before = _token_logps(plain, probes)
    together = _token_logps(load_adapter(plain, adapter), probes)
    del plain
    gc.collect()
    after = _token_logps(load_model(merged, dtype=compute, device=device), probes)
    difference = float((after - together).abs().mean())
    effect = float((together - before).abs().mean())
    # A merge into a narrow dtype may not cost most of what was learnt, either.
    allowed = max(min(max(_ALLOWED[d] for d in formats), 0.8 * effect), 1e-4)
    if not difference <= allowed:
        raise UserError(
            f"the merged model does not say what base and adapter say: token log-probs differ by "
            f"{difference:.4g} nats on average over {after.numel()} probe tokens (allowed "
            f"{allowed:.2g}; the adapter itself changes them by {effect:.4g}). The merge was "
            "discarded. If the dtype is narrow, merge with --dtype float32; otherwise the "
            "adapter belongs to another base or a file is damaged."
        )
    return Verified(difference, effect, after.numel())


def _token_logps(model: Any, probes: Sequence[Sequence[int]]) -> Tensor:
    found = []
    with torch.no_grad():
        for probe in probes:
            ids = torch.tensor([list(probe[:_MAX_TOKENS])], device=model.device)
            logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            found.append(logps[:-1].gather(1, ids[0, 1:, None])[:, 0].cpu().double())
    return torch.cat(found)
