"""A model whose weights are spread over processes, as what generates text takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from tandem.errors import UserError
from tandem.model.unwrap import plain_model


class SpreadModel:
    """Answers as `generate_answers` asks it, in all processes alike.

    They go on with the tokens that rank 0 finds the likeliest, so that rounding cannot let them
    part. `compute` runs the model where its weights are gathered; `refuse` raises an error that
    all processes raise.
    """

    def __init__(
        self,
        model: Any,
        compute: Callable[[Callable[[], Any]], Any],
        refuse: Callable[[UserError], NoReturn],
    ) -> None:
        self._model, self._compute, self._refuse = model, compute, refuse
        plain = plain_model(model)
        self.device = plain.device
        self._is_stateful = getattr(plain, "_is_stateful", False)

    def get_base_model(self) -> Any:
        """See `plain_model`."""
        return plain_model(self._model)

    def __call__(self, **inputs: Any) -> Any:
        """What the model returns, with the logits of the last token alone [R, 1, V]."""
        output = self._compute(lambda: self._model(**inputs))
        logits = output.logits[:, -1:].contiguous()
        dist.broadcast(logits, src=0)
        output.logits = logits
        return output

    def generate(self, **_: Any) -> NoReturn:
        """Raise UserError: what transformers does with this model is not known to all processes."""
        self._refuse(
            UserError(
                f"samples: {type(self.get_base_model()).__name__} keeps state of its own across "
                "tokens, and the engine spreads its weights over the processes, so it cannot "
                "answer prompts while it trains. Leave samples out, or use another engine"
            )
        )
