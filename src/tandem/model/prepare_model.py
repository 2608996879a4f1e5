"""A base model with a fresh adapter, attending over trees, compiled if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tandem.data.batching.collate import collate, record_key
from tandem.data.records import Example
from tandem.data.tokenize.added_tokens import AddedTokens
from tandem.model.added_tokens import make_rows
from tandem.model.attention.select import use_backend
from tandem.model.keyed_dropout import silence
from tandem.model.logprobs.sequence_logps import check_head, sequence_logps
from tandem.model.lora.adapter import (
    adapts_experts,
    add_adapter,
    checkpoint_activations,
    modules_out_of_reach,
)
from tandem.model.torch_compile import Compiling, compile_elementwise
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device


def adapted(
    model: Any,
    settings: TrainingSettings,
    *,
    backend: str,
    dropout: bool,
    compiled: bool,
    base_name: str,
    seed: int,
    log: Callable[[str], None],
    added: AddedTokens | None = None,
) -> Any:
    """Wrap a loaded model with the adapter that the settings ask for.

    Args:
        model: loaded, its attention still its own.
        settings: of the stage.
        backend: how it will attend.
        dropout: whether the adapter's dropout may be on.
        compiled: whether torch.compile takes norms and gated MLPs.
        base_name: what the saved adapter names as its base.
        seed: of the adapter's weights.
        log: told what is left out or switched off.
        added: tokens whose embeddings are trained, and made where the model has none.
    """
    if added:
        make_rows(model, added)
    check_head(model)
    out_of_reach = modules_out_of_reach(model)
    if compiled:
        compile_elementwise(model)
    use_backend(model, backend)
    if silenced := silence(model):
        log(
            f"the base model's own dropout ({silenced} modules) is off; only lora.dropout acts, "
            "with masks that do not depend on the schedule"
        )
    lora = settings.lora
    if lora.dropout > 0 and not dropout:
        log(
            f"lora.dropout {lora.dropout} does nothing here: dropout is off, so that policy and "
            "reference are the same function and prefixes can be shared"
        )
    if out_of_reach and lora.target_modules == "all-linear":
        names = sorted({name.rsplit(".", 1)[-1] for name in out_of_reach})
        log(
            f"all-linear leaves out {', '.join(names)}: the model does not use these layers as "
            "plain products, so an adapter there would do nothing"
        )
    model = add_adapter(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout if dropout else 0.0,
        target_modules=lora.target_modules,
        base_name=base_name,
        seed=seed,
        out_of_reach=out_of_reach,
        added_ids=added.ids if added else (),
    )
    if lora.dropout > 0 and dropout and adapts_experts(model):
        log(
            f"lora.dropout {lora.dropout} acts on the other layers, not on the experts, whose "
            "update is added to their weights; adapter_config.json says 0, as peft demands"
        )
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def warm_up(model: Any, trees: Sequence[Example], device: Device, *, seed: int) -> Compiling:
    """Compile what the run will need, on two records, before a clock runs.

    The model is not yet the engine's, which may watch every backward.
    """
    compiling = Compiling()
    batches = [
        collate([trees[i]], [record_key(seed, 0, i)]).to(device.torch_device)
        for i in (0, len(trees) - 1)
    ]
    autocast = device.autocast
    with torch.autocast(device.kind, autocast, enabled=autocast is not None):
        compiling.warm_up(model, partial(sequence_logps, model), batches)
    return compiling
