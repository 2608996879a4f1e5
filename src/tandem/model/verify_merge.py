"""Checks a merged model: it computes what base and adapter together do."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.model.added_tokens import make_missing_rows
from tandem.model.layer_walk import ProbeLogps
from tandem.model.load_model import load_adapter, load_base, load_model
from tandem.model.lora.adapter import added_ids_of_folder

# Mean absolute difference of a token's log-prob that the stored dtype explains.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verified:
    """Mean absolute differences of token log-probs on the probe texts, in nats."""

    difference: float  # between the merged model and base + adapter
    effect: float  # between base + adapter and the base alone
    tokens: int

    @property
    def lossy(self) -> bool:
        """Whether rounding took a noticeable part of what the adapter had learnt."""
        return self.difference > max(0.2 * self.effect, 1e-4)


def verified(logps: ProbeLogps, formats: Collection[torch.dtype]) -> Verified:
    """Compare the three models' log-probs; `formats` are what the weights were rounded to.

    Raises UserError when merged and base + adapter differ by more than `formats` explain.
    """
    difference = float((logps.merged - logps.adapted).abs().mean())
    effect = float((logps.adapted - logps.base).abs().mean())
    # A merge into a narrow dtype may not cost most of what was learnt, either.
    allowed = max(min(max(_ALLOWED[d] for d in formats), 0.8 * effect), 1e-4)
    if not difference <= allowed:
        raise UserError(
            f"the merged model does not compute what base and adapter do: token log-probs differ "
            f"by {difference:.4g} nats on average over {logps.merged.numel()} probe tokens "
            f"(allowed {allowed:.2g}; the adapter itself changes them by {effect:.4g}). The merge "
            "was discarded. If the dtype is narrow, merge with --dtype float32; otherwise the "
            "adapter belongs to another base or a file is damaged."
        )
    return Verified(difference, effect, logps.merged.numel())


def whole_models(
    base: Path,
    adapter: Path,
    merged: Path,
    probes: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ProbeLogps:
    """Compute the probe texts' log-probs by whole models, one after the other.

    The base is quantised here where it was in training. `probes` are token ids, `dtype` is that of
    the computation.
    """
    plain = load_base(base, adapter, dtype=dtype, device=device)
    make_missing_rows(plain, added_ids_of_folder(adapter))
    before = _token_logps(plain, probes)
    together = _token_logps(load_adapter(plain, adapter), probes)
    del plain
    gc.collect()
    after = _token_logps(load_model(merged, dtype=dtype, device=device), probes)
    return ProbeLogps(before, together, after)


def _token_logps(model: Any, probes: Sequence[Sequence[int]]) -> Tensor:
    parts = []
    with torch.no_grad():
        for probe in probes:
            ids = torch.tensor([list(probe)], device=model.device)
            logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            parts.append(logps[:-1].gather(1, ids[0, 1:, None])[:, 0].cpu().double())
    return torch.cat(parts)
