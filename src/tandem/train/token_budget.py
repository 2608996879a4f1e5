"""How many tokens a micro-batch may hold, and how it is split when memory runs out."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from tandem.data.encoded.example import Example
from tandem.errors import Stopped, UserError
from tandem.runtime.device import Device
from tandem.runtime.launch import ask_for_restart
from tandem.runtime.process_group import ProcessGroup

T = TypeVar("T")

Members = tuple[int, ...]
"""A micro-batch: positions of trees."""

# Share of the free memory that a micro-batch's activations may take.
_ACTIVATION_SHARE = 0.4
# Words of allocators that raise a plain RuntimeError.
_WORDS = (
    "out of memory", "can't allocate memory", "not enough memory", "allocation failed",
    "failed to allocate",
)  # fmt: skip


def attention_weight(config: Any) -> float:
    """What attention over a visible pair of tokens costs, by what a token costs elsewhere.

    Two products of hidden size each, by the multiplications of a layer's projections and gated
    MLP. Only the balance between processes depends on it, never a result.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:  # a model without attention
        return 0.0
    kept = int(getattr(text, "num_key_value_heads", None) or heads) / heads
    return 2 * hidden / ((2 + 2 * kept) * hidden**2 + 3 * hidden * inner)


def activation_bytes(config: Any) -> int:
    """An estimate of what a token keeps for the backward, in float32, all layers together."""
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    # Residuals, norms, projections and adapters' inputs, and the gated MLP's products.
    return layers * (16 * hidden + 5 * inner) * 4


def token_budget(
    requested: int | Literal["auto"], device: Device, config: Any, free: int | None = None
) -> int:
    """Tokens that a micro-batch should not exceed.

    `auto` divides a share of the free memory (`free` bytes, or what is free now) by an estimate of
    the activations a token keeps for the backward, bounded by what keeps the device busy.
    """
    if requested != "auto":
        return requested
    if free is None:
        free = device.free_memory()
    fitting = int(free * _ACTIVATION_SHARE / activation_bytes(config))
    return max(256, min(device.most_rows, fitting))


class TokenBudget:
    """Tokens that a micro-batch should not exceed: fewer after running out of memory.

    Args:
        tokens: at first.
        release: gives the device's unused memory back.
        remember: keeps a smaller budget for a resumed run.
        alone: whether this process can go on with smaller micro-batches by itself. With spread
            weights the others wait inside the one that failed, and all must begin anew.
    """

    def __init__(
        self,
        tokens: int,
        release: Callable[[], None],
        remember: Callable[[int], None],
        *,
        alone: bool,
    ) -> None:
        self.tokens = self._settled = tokens
        self._release, self._remember, self._alone = release, remember, alone

    def run(
        self,
        pieces: Sequence[Members],
        tokens: Sequence[int],
        compute: Callable[[Members, bool], T],
        no_room: Callable[[int], Exception],
    ) -> list[tuple[Members, T]]:
        """Compute micro-batches one after the other, in smaller ones where memory runs out.

        One that does not fit is split, and so is every later one of its size. A single tree is
        tried once more, after unused memory is given back.

        Args:
            pieces: micro-batches, as positions of trees; tokens: of every tree.
            compute: called with a micro-batch and whether it is the last; it must leave nothing
                behind if it fails.
            no_room: the error of a tree that does not fit even alone.

        Returns the micro-batches that were computed, each with its result. Raises Stopped if this
        process cannot go on by itself.
        """
        done: list[tuple[Members, T]] = []
        pending = deque(pieces)
        again = False
        while pending:
            members = pending.popleft()
            result = self._attempt(lambda: compute(members, not pending))  # noqa: B023
            if result is not None:
                done.append((members, result))
                again = False
                continue
            size = sum(tokens[i] for i in members)
            single = len(members) == 1
            # Beyond the budget already, or tried again: smaller micro-batches do not help.
            if single and (again or (size > self.tokens and not self._alone)):
                raise no_room(members[0])
            if not single or not self._alone:
                self._lower(size)
            again = single
            pending = deque(_finer([members, *pending], tokens, self.tokens))
        return done

    def settle(self, budgets: Sequence[int], processes: ProcessGroup) -> None:
        """Go on with the smallest budget that any process has; all processes call it."""
        self.tokens = min(budgets)
        if self.tokens < self._settled:
            self._settled = self.tokens
            processes.on_rank0(lambda: self._remember(self.tokens))

    def _attempt(self, compute: Callable[[], T]) -> T | None:
        """What `compute` returns, or None if it ran out of memory, whose remains are then freed."""
        try:
            return compute()
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
        # Here the error is gone, and with it the frames that kept tensors alive.
        gc.collect()
        self._release()
        return None

    def _lower(self, failed: int) -> None:
        """Lower the budget below the tokens that did not fit; raise Stopped if not `alone`."""
        self.tokens = min(self.tokens, max(1, failed // 2))
        if not self._alone:
            self._remember(self.tokens)
            reason = (
                f"out of memory with {failed} tokens at once; the run resumes from its last "
                f"checkpoint with {self.tokens} tokens a micro-batch"
            )
            if not ask_for_restart(reason):
                reason += ", by the same command"
            raise Stopped(reason)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def _finer(pieces: Sequence[Members], tokens: Sequence[int], budget: int) -> list[Members]:
    """The same trees in micro-batches that fit the budget, or hold a single tree."""
    fine: list[Members] = []
    todo = deque(pieces)
    while todo:
        members = todo.popleft()
        if len(members) > 1 and sum(tokens[i] for i in members) > budget:
            todo.extendleft(reversed(_halves(members, tokens)))
        else:
            fine.append(members)
    return fine


def _halves(members: Members, tokens: Sequence[int]) -> list[Members]:
    """Two parts with about equally many tokens, in order, of at least two trees."""
    total = sum(tokens[i] for i in members)
    running, cut = 0, 0
    while cut < len(members) - 1 and running * 2 < total:
        running += tokens[members[cut]]
        cut += 1
    return [members[:cut], members[cut:]]


def no_room(tree: Example, tokens: int) -> UserError:
    """The error of a record that does not fit in memory even alone."""
    return UserError(
        f"out of memory: {tree.origin}, {tokens} tokens, does not fit even alone. Lower "
        "max_length, set gradient_checkpointing: true, or spread the model over several devices "
        "(engine: fsdp2 or deepspeed-zero3)."
    )
