"""Dropout whose masks depend on seed, step, record, token and module alone, not on the schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.errors import UserError


@dataclass
class DropoutKeys:
    """The key of each row that is fed, [T] or [S, L] int64; set before each forward."""

    keys: Tensor | None = None


class KeyedDropout(nn.Module):
    """Inverted dropout with masks computed from the rows' keys.

    An element is dropped where (row key x odd channel constant) mod 2^32, a multiply-shift hash
    (Dietzfelbinger et al., 1997), falls into the lowest share p of its range. So a record draws
    the same mask whatever shares its micro-batch, wherever it runs, and after a resume.

    Args:
        p: the probability of zeroing an element.
        module_number: tells this module's masks from other modules'.
        shared: where the keys of the current micro-batch are found.
    """

    def __init__(self, p: float, module_number: int, shared: DropoutKeys) -> None:
        super().__init__()
        self.p = p
        self.module_number = module_number
        self.shared = shared
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


def silence(model: nn.Module) -> int:
    """Turn off the dropout that a base model brings along; returns how many modules had some.

    Its masks would come from the device's random state, so they would depend on the schedule, and
    DPO's policy would differ from its reference.
    """
    found = 0
    for module in model.modules():
        # A module of its own, or a rate that a layer hands to functional dropout or attention.
        names = ["p"] if isinstance(module, nn.Dropout) else _rates(module)
        active = [name for name in names if getattr(module, name) > 0]
        for name in active:
            setattr(module, name, 0.0)
        found += bool(active)
        # Some layers look the rate up at every call.
        config = getattr(module, "config", None)
        for name in _rates(config) if config is not None else []:
            setattr(config, name, 0.0)
    return found


def _rates(owner: object) -> list[str]:
    return [name for name, v in vars(owner).items() if "drop" in name and isinstance(v, float)]


def keep_mask(keys: Tensor, channels: Tensor, p: float) -> Tensor:
    """[T, C] bool, each element True with probability 1 - p; see `KeyedDropout`.

    Args:
        keys: [T] int64.
        channels: [C] odd int32.
        p: the probability of False.
    """
    rows = (keys ^ (keys >> 32)).to(torch.int32)
    # Multiplication wraps modulo 2^32; as a signed number the product is uniform over its range.
    product = rows[:, None] * channels[None, :]
    return product >= int(-(2**31) + p * 2**32)
