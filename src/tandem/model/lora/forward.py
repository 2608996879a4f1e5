"""What an adapter computes beside its layers: dropout by keys, and trained rows of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.lora.adapted import acting
from tandem.model.unwrap import plain_model


@dataclass
class DropoutKeys:
    """The key of each row that is fed, [T] or [S, L] int64; set before each forward.

    `lengths`, of the same shape, has the tokens that the row's record feeds.
    """

    keys: Tensor | None = None
    lengths: Tensor | None = None


class KeyedDropout(nn.Module):
    """Inverted dropout with masks computed from the rows' keys.

    An element is dropped where (row key x odd channel constant) mod 2^32, a multiply-shift hash
    (Dietzfelbinger et al., 1997), falls into the lowest share p of its range. So a record draws the
    same mask whatever shares its micro-batch, wherever it runs, and after a resume. `module_number`
    tells this module's masks from other modules', `shared` holds the keys of the micro-batch.
    """

    def __init__(self, p: float, module_number: int, shared: DropoutKeys) -> None:
        super().__init__()
        self.p, self.module_number, self.shared = p, module_number, shared
        self._channels: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C], a row for each key; the identity in evaluation mode."""
        if not self.training:
            return hidden
        keys = self.shared.keys
        if keys is None:
            raise ValueError("dropout is on but the micro-batch carries no dropout keys")
        if hidden.numel() != keys.numel() * hidden.shape[-1]:
            raise UserError(
                "lora.dropout: a module sees only some of the tokens, as the experts of a mixture "
                "do, so its masks cannot follow the record. Set lora.dropout to 0, or leave the "
                "experts out of lora.target_modules."
            )
        # Some models pass their tokens on as [S x L, C]; the order of rows stays the same.
        mask = keep_mask(keys.flatten(), self._channel_constants(hidden), self.p)
        return hidden * (mask.view(hidden.shape).to(hidden.dtype) * (1.0 / (1.0 - self.p)))

    def _channel_constants(self, hidden: Tensor) -> Tensor:
        channels = hidden.shape[-1]
        if self._channels is None or self._channels.device != hidden.device:
            generator = torch.Generator().manual_seed(self.module_number)
            constants = torch.randint(-(2**31), 2**31, (channels,), generator=generator)
            self._channels = (constants | 1).to(torch.int32).to(hidden.device)
        return self._channels


def keep_mask(keys: Tensor, channels: Tensor, p: float) -> Tensor:
    """[T, C] bool, False with probability p, of keys [T] int64 and odd channels [C] int32."""
    rows = (keys ^ (keys >> 32)).to(torch.int32)
    # Multiplication wraps modulo 2^32; as a signed number the product is uniform over its range.
    product = rows[:, None] * channels[None, :]
    return product >= int(-(2**31) + p * 2**32)


def share_dropout_keys(model: Any) -> None:
    """Let `set_dropout_keys` reach all keyed dropout modules of a model at once."""
    dropout = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    if dropout:
        plain_model(model).tandem_dropout = dropout[0].shared


def set_dropout_keys(model: nn.Module, keys: Tensor | None, lengths: Tensor | None = None) -> None:
    """Hand the keys of the rows that are fed, [T] or [S, L], to what draws by them.

    `lengths`, of the same shape, are for noise; see `DropoutKeys`.
    """
    shared: Any = getattr(model, "tandem_dropout", None)
    if shared is not None:
        shared.keys, shared.lengths = keys, lengths


def switch_dropout_off(model: nn.Module) -> int:
    """Turn off a base model's own dropout; returns how many modules had some.

    Its masks would come from the device's random state, so they would depend on how the work is
    packed, and DPO's policy would differ from its reference.
    """
    count = 0
    for module in model.modules():
        # A module of its own, or a rate that a layer hands to functional dropout or attention.
        names = ["p"] if isinstance(module, nn.Dropout) else _rates(module)
        active = [name for name in names if getattr(module, name) > 0]
        for name in active:
            setattr(module, name, 0.0)
        count += bool(active)
        # Some layers look the rate up at every call.
        config = getattr(module, "config", None)
        for name in _rates(config) if config is not None else []:
            setattr(config, name, 0.0)
    return count


def _rates(owner: object) -> list[str]:
    return [name for name, v in vars(owner).items() if "drop" in name and isinstance(v, float)]


def look_up_trained_rows(model: Any) -> None:
    """Let an embedding put its trained rows where they are fed, unless it does more than look up.

    peft copies the whole matrix at each forward, and makes a gradient of its size at each backward.
    """
    layer = getattr(plain_model(model).get_input_embeddings(), "token_adapter", None)
    if layer is None:
        return
    if type(layer.base_layer) is nn.Embedding and layer.base_layer.max_norm is None:
        layer.forward = partial(_looked_up, layer, layer.forward)


def _looked_up(layer: Any, plain: Any, ids: Tensor) -> Tensor:
    name = acting(layer)
    if name not in layer.trainable_tokens_delta:
        return plain(ids)
    frozen = F.embedding(ids, layer.base_layer.weight)
    trained = layer.trainable_tokens_delta[name].to(frozen.dtype)
    same = ids[..., None] == torch.tensor(layer.token_indices[name], device=ids.device)
    rows = F.embedding(same.int().argmax(dim=-1), trained)
    return torch.where(same.any(dim=-1)[..., None], rows, frozen)
