"""A model that was prepared for packed trees, generating text for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from tandem.model.unwrap import plain_model


@contextmanager
def by_own_attention(model: Any, *, compiled: bool) -> Iterator[None]:
    """Within it a model attends as transformers made it, and computes all rows of its last layer.

    So `generate_answers` can ask it, adapters or not. Graphs that were `compiled` for training are
    left alone: other shapes could have them made anew.
    """
    plain = plain_model(model)
    own = getattr(plain, "tandem_own_attention", None)
    packed = None if own is None else plain.config._attn_implementation
    read = getattr(plain, "tandem_rows", None)
    if read is not None:
        read.rows = None  # of the micro-batch before
    if own is not None:
        plain.set_attn_implementation(own)
    try:
        # Without graphs there is no need to load torch's compiler.
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        if own is not None:
            plain.set_attn_implementation(packed)
