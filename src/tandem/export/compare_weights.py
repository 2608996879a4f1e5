"""Compares the weights and settings of a file with a model, and what both compute."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.export.families import (
    Layout,
    extra_tensors,
    family_of,
    layout_of,
    settings_of,
)
from tandem.export.file_forward import file_logps
from tandem.export.formats import UNPACKED, error_bound, rounded, rows_at_once, share_bound
from tandem.export.gguf_file import GgufFile
from tandem.export.write_gguf import file_names
from tandem.model.read_model import ModelFolder, read_in_layers

# What float32 explains of a log-prob, in nats, where two programs add in another order: usually
# less than 1e-4, and more where activations are large. Other weights or settings make more of it.
_FLOAT32 = 5e-3
# The format of settings in files is float32.
_SETTING = 1e-6


@dataclass(frozen=True)
class WeightsCompared:
    """How many tensors of each format were compared, and how far apart what is computed is.

    Differences are the largest of any token's log-prob, in nats; `kl` is the mean divergence of the
    file's predictions from the model's.
    """

    formats: Mapping[str, int]
    exact: int  # tensors that have the bits of the model's rounding
    from_rounded: float  # the file against the model with the same rounding
    from_model: float  # the file against the model as it is
    kl: float
    tokens: int


def compare_settings(file: GgufFile, config: Any) -> None:
    """Raise UserError for a file that says something else of a model than its configuration."""
    wanted = family_of(config).architecture
    if file.architecture != wanted:
        raise UserError(
            f"{file.path} is of the architecture {file.architecture!r}, and the model is "
            f"{config.model_type}, which is {wanted!r} in GGUF."
        )
    for key, value in settings_of(config).items():
        there = file.setting(key, _assumed(key, value, config))
        if there is None or not _alike(there, value):
            raise UserError(
                f"{file.path} says {wanted}.{key} = {there}, and the model has {value}. The file "
                "is of another model, or was converted wrongly."
            )


def compare_tensors(
    file: GgufFile, source: Path, model: Any, advance: Callable[[int], None] = lambda _: None
) -> tuple[Counter[str], int]:
    """Compare each tensor with the model's weight; `model` has no weights.

    Returns how many tensors there are of each format, and how many have exactly the bits that
    rounding gives. Raises UserError for one that rounding does not explain.
    """
    config, weights = model.config, ModelFolder(source, model)
    formats, exact = file.formats, 0
    names = file_names(model)
    expected = {*names.values(), *extra_tensors(config)}
    if more := sorted(set(file.names()) - expected - {"output.weight"}):
        raise UserError(f"{file.path} has tensors that the model does not: {', '.join(more[:3])}")
    for name, values in extra_tensors(config).items():
        _require_there(file, name)
        if not torch.allclose(file.tensor(name), values, rtol=1e-5, atol=0):
            raise UserError(f"{file.path}: {name} is not what the model's configuration makes")
    for weight, name in names.items():
        _require_there(file, name)
        found = weights.read([weight, "lm_head.weight"] if "embed" in weight else [weight])
        own = next(iter(found.values()))
        exact += _compare_tensor(file, name, own, layout_of(config, name))
        advance(1)
    return Counter(formats[name] for name in names.values()), exact


def compare_logps(
    file: GgufFile, source: Path, model: Any, sequences: Sequence[Sequence[int]]
) -> tuple[float, float, float]:
    """Compare what a file computes with the model, rounded as the file is, and as it is.

    Returns the largest differences of log-probs, and the mean KL divergence from the model. Raises
    UserError where the file computes something else than the rounded model.
    """
    there = file_logps(file, sequences)
    names, formats = file_names(model), file.formats
    config = model.config

    def as_in_file(weight: str, stored: Tensor) -> Tensor:
        name = names.get(weight) or names["model.embed_tokens.weight"]
        layout = layout_of(config, name)
        if formats[name] not in UNPACKED:  # only the file knows what was made of them
            return layout.from_file(file.tensor(name))
        step = rows_at_once(stored.shape) if stored.dim() > 1 else len(stored)
        made = torch.empty(stored.shape)
        for row in range(0, len(stored), step):
            part = stored[row : row + step].float() + layout.shift
            values = rounded(part, formats[name])
            assert values is not None
            made[row : row + step] = values - layout.shift
        return made

    alike = _model_logps(source, config, sequences, as_in_file)
    from_rounded = _largest(there, alike)
    if not from_rounded <= _FLOAT32:
        raise UserError(
            f"{file.path} does not compute what the model does: with the same rounding of weights, "
            f"token log-probs differ by up to {from_rounded:.3g} nats (float32 explains "
            f"{_FLOAT32:g}). Weights are in another order, or a setting is wrong."
        )
    plain = _model_logps(source, config, sequences, lambda _, stored: stored)
    both = zip(plain, there, strict=True)
    kl = torch.cat([(ours.exp() * (ours - theirs)).sum(-1) for ours, theirs in both])
    return from_rounded, _largest(there, plain), float(kl.mean().clamp(min=0))


def _model_logps(
    source: Path,
    config: Any,
    sequences: Sequence[Sequence[int]],
    changed: Callable[[str, Tensor], Tensor],
) -> list[Tensor]:
    """transformers' log-probs of every next token of each sequence, one layer in memory."""
    model = read_in_layers(source, config, dtype=torch.float32, changed=changed)
    longest = max(map(len, sequences))
    ids = torch.tensor([[*one, *[one[-1]] * (longest - len(one))] for one in sequences])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return [logps[row, : len(one) - 1] for row, one in enumerate(sequences)]


def _largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of log-probs of tokens that are at all likely."""
    most = 0.0
    for ours, theirs in zip(one, other, strict=True):
        likely = theirs > -20
        most = max(most, float(((ours - theirs).abs() * likely).max()))
        if not bool(torch.isfinite(ours).all()):
            return math.inf
    return most


def _compare_tensor(file: GgufFile, name: str, own: Tensor, layout: Layout) -> bool:
    """Whether a tensor has the bits of the model's rounding; UserError if it is another tensor."""
    if file.shape(name) != tuple(own.shape):
        raise UserError(
            f"{file.path}: {name} has the sizes {file.shape(name)}, the model's {tuple(own.shape)}"
        )
    kind, wanted = file.formats[name], layout.to_file(own)
    step = rows_at_once(own.shape) if own.dim() > 1 else len(own)
    exact, explained, error, scale = True, True, 0.0, 0.0
    for row in range(0, len(own), step):
        rows = slice(row, row + step)
        there, part = file.tensor(name, rows), wanted[rows].float()
        made = rounded(part, kind)
        if made is None or not torch.equal(made, there):
            difference, bound = (there - part).abs(), error_bound(part, kind)
            exact = False
            explained &= bound is not None and bool((difference <= 2 * bound).all())
            error += float(difference.double().square().sum())
        scale += float(part.double().square().sum())
    if exact:
        return True
    share = math.sqrt(error / max(scale, 1e-30))
    bounded = kind in UNPACKED
    if explained or (not bounded and share <= share_bound(kind)):
        return False
    limit = "its rounding" if bounded else f"{share_bound(kind):.0%} in {kind}"
    raise UserError(
        f"{file.path}: {name} is not the model's weight: they differ by {share:.2%} of its size, "
        f"more than {limit} explains{_other_order(file, name, own, layout)}. The file is of other "
        "weights, or was converted wrongly."
    )


def _other_order(file: GgufFile, name: str, own: Tensor, layout: Layout) -> str:
    """What to add to a message where the file has the model's numbers in transformers' order."""
    if not (layout.heads or layout.shift):
        return ""
    apart = float((file.tensor(name) - own.float()).abs().mean())
    if apart < 0.1 * float(own.float().abs().mean()):
        return "; they are in transformers' order, which GGUF's differs from"
    return ""


def _require_there(file: GgufFile, name: str) -> None:
    if name not in file:
        raise UserError(f"{file.path} lacks the tensor {name} of the model")


def _assumed(key: str, value: float | str, config: Any) -> Any:
    """What llama.cpp takes for a setting that a file does not have; None if it needs it."""
    head = config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": value,  # it counts the tokens
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": head,
        "rope.scaling.attn_factor": 1.0,
        "attention.sliding_window": value if config.model_type == "phi3" else None,
        "rope.scaling.original_context_length": config.max_position_embeddings,
    }.get(key)


def _alike(there: Any, value: float | str) -> bool:
    if isinstance(value, str) or isinstance(there, str):
        return bool(there == value)
    return math.isclose(float(there), float(value), rel_tol=_SETTING)
