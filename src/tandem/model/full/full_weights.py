"""All weights of a model as what is trained: attached, kept in checkpoints, written as a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from tandem.errors import UserError
from tandem.model.companion_files import copy_surroundings
from tandem.model.model_folder import load_config, model_without_weights
from tandem.model.trained_weights import Log, set_decay
from tandem.model.weight_files import opened, read_headers, stored_dtype
from tandem.runtime.device import torch_dtype
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.hashing import weight_files

# The trained weights as they are in a checkpoint: whole, in the format that they are trained in.
_TRAINED = "trained.safetensors"
# A share of the change that is worth a warning.
_MUCH = 0.1


@dataclass(frozen=True)
class FullWeights:
    """All weights of the model in a folder, as `TrainedWeights`.

    A checkpoint has them in the format that they are trained in; a finished stage is a model in
    the format that its base is stored in.
    """

    base: Path
    dtype: str = "auto"  # of the model that is left, by name; auto: the base's own
    leaves: ClassVar[Literal["adapter", "model"]] = "model"

    def attach(
        self,
        model: Any,
        *,
        unreached: Sequence[str] = (),
        added_ids: Sequence[int] = (),
        log: Log = lambda _: None,
    ) -> Any:
        """Let every weight of a model be trained; biases and norms do not decay."""
        del unreached, added_ids
        count = 0
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                raise UserError("full: weights that are no plain numbers cannot be trained")
            parameter.requires_grad_(True)
            set_decay(parameter, parameter.dim() > 1)
            count += parameter.numel()
        log(f"all {count:,} weights are trained")
        return model

    def save(self, model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the trained weights into a folder, as they are trained."""
        del model
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                  folder / _TRAINED)  # fmt: skip

    def load(self, model: Any, folder: Path) -> None:
        """Do nothing: the model is its own reference first, and gets `late` weights afterwards."""

    def late(self, folder: Path) -> dict[str, Tensor]:
        """The weights of a checkpoint, by name."""
        return load_file(folder / _TRAINED)

    def finish(self, folder: Path) -> str:
        """Turn what `save` wrote into a model's folder, without its tokenizer.

        Returns a warning where rounding took much of what training changed, else nothing. Raises
        UserError where the weights' names would not be those of the base.
        """
        config = load_config(self.base)
        dtype = torch_dtype(self.dtype) or stored_dtype(self.base)
        weights, lost = _rounded(folder / _TRAINED, self.base, dtype)
        described = model_without_weights(config)
        rows = _embedding_rows(weights, described)
        with _no_progress():
            described.save_pretrained(str(folder), state_dict=weights)  # which empties it
        (folder / _TRAINED).unlink()
        copy_surroundings(self.base, self.base, folder, dtype)
        written = read_json(folder / "config.json")
        text = written if "vocab_size" in written else written["text_config"]
        if rows > text["vocab_size"]:
            text["vocab_size"] = rows
            atomic_write_json(folder / "config.json", written)
        _check_names(self.base, folder)
        if lost <= _MUCH:
            return ""
        named = str(dtype).removeprefix("torch.")
        return (
            f"rounding to {named} changes the weights by {lost:.0%} of what training changed; "
            "checkpoints have them as they were trained, and save_dtype: float32 keeps them so"
        )

    @contextmanager
    def reference(self, model: Any) -> Iterator[None]:
        """The model without dropout; it is asked for before anything is trained or put back."""
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _rounded(file: Path, base: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Return the weights of a file in another format, and how much of the training that loses.

    That is the norm of what rounding changed by that of what training changed, over all weights.
    The weights are read one by one.
    """
    weights: dict[str, Tensor] = {}
    lost = moved = 0.0
    with ExitStack() as stack:
        trained = stack.enter_context(opened(file))
        shards = [stack.enter_context(opened(shard)) for shard in weight_files(base)]
        shard_of = {name: shard for shard in shards for name in list(shard.keys())}
        for name in list(trained.keys()):
            wide = trained.get_tensor(name)
            weights[name] = wide.to(dtype)
            if name not in shard_of:
                continue
            before = shard_of[name].get_tensor(name).float()
            if before.shape == wide.shape:
                lost += float((weights[name].float() - wide.float()).norm()) ** 2
                moved += float((wide.float() - before).norm()) ** 2
    return weights, (lost / moved) ** 0.5 if moved else 0.0


@contextmanager
def _no_progress() -> Iterator[None]:
    """Silence transformers' bar of the files that it writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _embedding_rows(weights: Mapping[str, Tensor], described: Any) -> int:
    """Rows of the input embeddings among some weights, by the names of a described model."""
    names = {id(p): name for name, p in described.named_parameters()}
    name = names[id(described.get_input_embeddings().weight)]
    return int(weights[name].shape[0])


def _check_names(base: Path, folder: Path) -> None:
    before, now = (set(read_headers(one)) for one in (base, folder))
    # A head that shares its weights may be stored once more.
    strange = sorted(name for name in before ^ now if not name.endswith("lm_head.weight"))
    if strange:
        raise UserError(
            f"full: the trained model's files would not have the names of {base} ({strange[0]} and "
            f"{len(strange) - 1} more), so that other programs could not read them"
        )


def check_full(*, quantization: str | None) -> None:
    """Raise UserError for what full fine-tuning cannot do."""
    if quantization:
        raise UserError(
            f"full: weights in 4 bits (quantization: {quantization}) cannot be trained; leave "
            "quantization out, or train an adapter"
        )


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format that weights are trained in: a step is smaller than bfloat16 can add."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
