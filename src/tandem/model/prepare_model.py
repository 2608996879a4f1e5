"""Everything that is done to a model; the lists at the end have the order and its reasons.

A change is one function; only the functions that it calls by name replace a module's forward or set
a `tandem_...` attribute of a model that is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.errors import UserError
from tandem.model.added_tokens import make_missing_rows, make_rows
from tandem.model.attention.select import is_padded, use_backend
from tandem.model.cpu.onednn_linear import order_weights, speed_up_frozen_products
from tandem.model.cpu.stored_weights import is_stored, keep_stored, widen
from tandem.model.elementwise import compile_elementwise, fuse_elementwise
from tandem.model.logprobs.last_layer import skip_unread_rows
from tandem.model.logprobs.output_head import order_head
from tandem.model.logprobs.sequence_logps import check_head
from tandem.model.lora.adapted import fuse_low_rank
from tandem.model.lora.adapter import added_ids_of_folder, wrap_with_saved
from tandem.model.lora.forward import (
    look_up_trained_rows,
    share_dropout_keys,
    switch_dropout_off,
)
from tandem.model.lora.input_noise import add_noise
from tandem.model.lora.targets import unreached_layers
from tandem.model.trained_weights import Log, TrainedWeights
from tandem.model.unwrap import plain_model


@dataclass(frozen=True)
class Preparation:
    """What the changes need to know; a list reads only some of it."""

    stored: bool = False  # whether a CPU keeps narrower weights than it computes with
    added: AddedTokens | None = None  # trained embeddings, made where the model has none
    adapter: Path | None = None  # folder of a saved adapter
    attention: str = "padded"  # the backend
    weights: TrainedWeights | None = None  # what is trained
    compiled: bool = False  # whether torch.compile takes norms and gated MLPs
    noise: float | None = None  # alpha of noise on the input embeddings in training, if any
    recomputed: bool = False  # whether activations are computed again in the backward, not kept
    reordered: bool = False  # whether frozen weights are kept in oneDNN's order as well


Change = Callable[[Any, Preparation, Log], Any]


def prepare_model(
    model: Any, changes: Sequence[Change], preparation: Preparation, log: Log = lambda _: None
) -> Any:
    """Apply one of the lists below to a causal language model in evaluation mode.

    Returns the model, or a wrapper around it; `log` is told what is left out or switched off.
    Raises UserError for a model that a change cannot be made to.
    """
    for change in changes:
        model = change(model, preparation, log)
    return model


def keep_stored_weights(model: Any, preparation: Preparation, _: Log) -> Any:
    """Compute in float32 with weights that were loaded as narrow as they are stored."""
    if preparation.stored:
        keep_stored(model)
    return model


def use_onednn_products(model: Any, _: Preparation, __: Log) -> Any:
    """Send products with frozen weights through oneDNN on CPU."""
    speed_up_frozen_products(model)
    return model


def use_cpu_elementwise(model: Any, _: Preparation, __: Log) -> Any:
    """Send norms and gated MLPs through the C kernels."""
    fuse_elementwise(model)
    return model


def add_token_rows(model: Any, preparation: Preparation, _: Log) -> Any:
    """Give added tokens rows in the embeddings, those of a saved adapter included."""
    ids = () if preparation.adapter is None else added_ids_of_folder(preparation.adapter)
    if is_stored(model) and (preparation.added or ids):
        widen(model.get_input_embeddings(), model.get_output_embeddings())
    if preparation.added:
        make_rows(model, preparation.added)
    if ids:
        make_missing_rows(model, ids)
    return model


def check_output_head(model: Any, _: Preparation, __: Log) -> Any:
    """Refuse a model whose logits are made in a way that tandem does not know."""
    check_head(model)
    return model


def find_unreached_layers(model: Any, _: Preparation, __: Log) -> Any:
    """Note the linear layers that the model does not call: an adapter there would do nothing."""
    model.tandem_unreached = unreached_layers(model)
    return model


def compile_norms_and_gates(model: Any, preparation: Preparation, _: Log) -> Any:
    """Send norms and gated MLPs through torch.compile."""
    if preparation.compiled:
        compile_elementwise(model)
    return model


def attach_attention(model: Any, preparation: Preparation, _: Log) -> Any:
    """Let the model attend over packed trees."""
    use_backend(model, preparation.attention)
    return model


def skip_rows_that_nothing_reads(model: Any, _: Preparation, __: Log) -> Any:
    """Let the last layer's MLP pass over rows that predict no target."""
    if not is_padded(model):
        skip_unread_rows(model)
    return model


def switch_off_base_dropout(model: Any, _: Preparation, log: Log) -> Any:
    """Switch off the base's own dropout."""
    if count := switch_dropout_off(model):
        log(
            f"the base model's own dropout ({count} modules) is off; only lora.dropout acts, "
            "with masks that do not depend on how the work is packed"
        )
    return model


def attach_trained_weights(model: Any, preparation: Preparation, log: Log) -> Any:
    """Freeze the model, and add or open what is trained."""
    assert preparation.weights is not None
    added_ids = preparation.added.ids if preparation.added else ()
    unreached = getattr(model, "tandem_unreached", ())
    return preparation.weights.attach(model, unreached=unreached, added_ids=added_ids, log=log)


def attach_saved_adapter(model: Any, preparation: Preparation, _: Log) -> Any:
    """Wrap the model with an adapter's folder."""
    assert preparation.adapter is not None
    return wrap_with_saved(model, preparation.adapter)


def speed_up_adapter(model: Any, _: Preparation, __: Log) -> Any:
    """Replace peft's products, dropout and trained rows by tandem's faster ones."""
    share_dropout_keys(model)
    fuse_low_rank(model)
    look_up_trained_rows(model)
    return model


def add_input_noise(model: Any, preparation: Preparation, _: Log) -> Any:
    """Add noise to what the input embeddings give in training."""
    if preparation.noise is not None:
        add_noise(model, preparation.noise)
    return model


def recompute_activations(model: Any, preparation: Preparation, _: Log) -> Any:
    """Recompute activations in the backward instead of keeping them; UserError where it cannot."""
    if not preparation.recomputed:
        return model
    base = plain_model(model)
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: {type(base).__name__} cannot recompute its activations; "
            "set it to false and lower tokens_per_microbatch instead"
        )
    base.enable_input_require_grads()
    enable = getattr(base, "activation_checkpointing_enable", None)
    # The second is its name in earlier transformers.
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def reorder_frozen_weights(model: Any, preparation: Preparation, _: Log) -> Any:
    """Keep frozen weights in the order that oneDNN multiplies fastest with, as well."""
    if preparation.reordered:
        order_weights(model)
        order_head(plain_model(model))
    return model


AFTER_LOADING: tuple[Change, ...] = (
    keep_stored_weights,
    use_onednn_products,
    # Compares each class of modules with its fused form, on the device.
    use_cpu_elementwise,
)
# New rows are new layers.
WITH_ADDED_TOKENS: tuple[Change, ...] = (add_token_rows, use_onednn_products)
# For chat, evaluation and the merge's check.
WITH_ADAPTER: tuple[Change, ...] = (*WITH_ADDED_TOKENS, attach_saved_adapter)
FOR_ANSWERS: tuple[Change, ...] = (check_output_head,)
FOR_SCORING: tuple[Change, ...] = (attach_attention, skip_rows_that_nothing_reads)
ATTACHED: tuple[Change, ...] = (attach_trained_weights, speed_up_adapter)
FOR_TRAINING: tuple[Change, ...] = (
    *WITH_ADDED_TOKENS,
    # These two run the model's original forward, so before its attention is replaced.
    check_output_head,
    find_unreached_layers,
    # Compares with each module's own forward.
    compile_norms_and_gates,
    *FOR_SCORING,
    # Before an adapter adds its own dropout.
    switch_off_base_dropout,
    *ATTACHED,
    # What is trained of the embeddings is under the noise.
    add_input_noise,
    # Its hook on the embedding must see the wrapped one.
    recompute_activations,
    # What is trained is known by now.
    reorder_frozen_weights,
)
