"""LoRA adapters through peft: put into a model, saved, loaded, switched off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError
from tandem.model.added_tokens import embedding_names
from tandem.model.cpu.stored_weights import as_float32, is_stored, widen
from tandem.model.lora.adapted import start_lengths
from tandem.model.lora.adapter_config import read_config
from tandem.model.lora.adapter_folder import check_copies, read_updates
from tandem.model.lora.forward import DropoutKeys, KeyedDropout
from tandem.model.lora.principal import (
    begin_principal,
    doubled,
    take_beginnings,
    with_beginnings,
)
from tandem.model.lora.saved_modules import (
    check_saved,
    fitting,
    saved_linear,
    settle_copies,
)
from tandem.model.lora.started import (
    START,
    acting_alone,
    check_fits,
    is_wrapper,
    load_into,
    started_config,
)
from tandem.model.lora.targets import (
    adapts_experts,
    check_patterns,
    check_targets,
    without_order,
)
from tandem.model.quantize import load_bitsandbytes, write_record
from tandem.model.trained_weights import Log, set_rate_factor
from tandem.recipe.lora_settings import LoraSettings

load_bitsandbytes()  # before peft does, which would print its messages

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter (arXiv 2106.09685) as `TrainedWeights`.

    B of a new one starts at zero. The settings may name one to go on with instead.
    """

    settings: LoraSettings
    seed: int = 0  # of A
    # what the saved adapter names as its base
    base: str = ""
    revision: str | None = None
    dropout: bool = False  # whether the settings' dropout acts, by masks independent of packing
    keeps_start: bool = False  # whether an adapter to go on with is kept as it was, for `reference`
    leaves: ClassVar[Literal["adapter", "model"]] = "adapter"

    def attach(
        self,
        model: Any,
        *,
        unreached: Sequence[str] = (),
        added_ids: Sequence[int] = (),
        log: Log = lambda _: None,
    ) -> Any:
        """Wrap a model with the adapter; UserError if a target fits no module that is called."""
        wanted = self.settings
        if wanted.dropout > 0 and not self.dropout:
            log(
                f"lora.dropout {wanted.dropout} does nothing here: dropout is off, so that policy "
                "and reference are the same function and prefixes can be shared"
            )
        wrapped = (
            self._new(model, unreached, added_ids, log)
            if wanted.start is None
            else self._started(model, log)
        )
        config = wrapped.peft_config["default"]
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                set_rate_factor(parameter, wanted.plus_ratio)
        config.base_model_name_or_path, config.revision = self.base, self.revision
        if self.dropout and wanted.dropout > 0:
            self._add_dropout(wrapped, log)
        return wrapped

    def _new(self, model: Any, unreached: Sequence[str], added_ids: Sequence[int], log: Log) -> Any:
        """Wrap a model with an adapter that changes nothing yet."""
        wanted = self.settings
        everywhere = wanted.target_modules == "all-linear"
        if unreached and everywhere:
            names = sorted({name.rsplit(".", 1)[-1] for name in unreached})
            log(
                f"all-linear leaves out {', '.join(names)}: the model does not use these layers as "
                "plain products, so an adapter there would do nothing"
            )
        if not everywhere:
            check_targets(model, wanted.target_modules, unreached)
        whole = wanted.modules_to_save
        check_saved(model, whole, () if everywhere else wanted.target_modules, unreached)
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        if added_ids and ends & {*fitting(model, whole).values()}:
            raise UserError(
                "lora.modules_to_save: embedding or head is trained as a whole, and added_tokens "
                "trains rows of both; name them in one of the two"
            )
        torch.manual_seed(self.seed)
        with _quiet(), as_float32(model), self._explained():
            wrapped = get_peft_model(model, self._config(model, unreached, added_ids))
        settle_copies(wrapped)
        config = wrapped.peft_config["default"]
        for key in ("rank_pattern", "alpha_pattern"):
            check_patterns(wrapped, key, getattr(wanted, key))
            setattr(config, key, without_order(wrapped, getattr(config, key)))
        start_lengths(wrapped)
        if wanted.init != "zero":
            if adapts_experts(wrapped):
                raise UserError(
                    f"lora.init: {wanted.init} is not for the experts of a mixture, whose weights "
                    "are one tensor; leave them out of lora.target_modules, or remove lora.init"
                )
            begin_principal(wrapped, wanted.init)
        return wrapped

    def _started(self, model: Any, log: Log) -> Any:
        """Wrap a model with the adapter to go on with; and with another that stays as it is."""
        assert self.settings.start is not None
        folder = Path(self.settings.start)
        config = started_config(self.settings)
        copied = copy.deepcopy(config)
        check_copies(folder, dict(model.named_parameters(remove_duplicate=False)).get)
        with _quiet(), as_float32(model):
            wrapped = get_peft_model(model, config)
            if self.keeps_start:
                if adapts_experts(wrapped):
                    raise UserError(
                        f"lora.from: {folder} adapts the experts of a mixture, which peft cannot "
                        "hold twice, so that it cannot be the reference as well. Merge it, and "
                        "train a new adapter on the merged model."
                    )
                wrapped.add_adapter(START, copied)
        settle_copies(wrapped)
        if isinstance(model.get_output_embeddings(), LoraLayer):
            raise UserError(
                f"lora.from: {folder} adapts the output head, which takes no adapter. Merge it, "
                "and train a new adapter on the merged model."
            )
        for name in wrapped.peft_config:
            if model.device.type != "meta":
                load_into(wrapped, folder, name)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and f".{START}." not in f".{name}.")
        log(f"goes on with the adapter {folder} (rank {config.r}, alpha {config.lora_alpha:g})")
        return wrapped

    def save(self, model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write adapter_config.json, adapter_model.safetensors, and how the base is quantised."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        weights, config = with_beginnings(model, weights), model.peft_config["default"]
        if self.settings.init != "zero":
            model.peft_config["default"] = doubled(config)
        try:
            model.save_pretrained(
                str(folder), state_dict=weights, save_embedding_layers=False,
                selected_adapters=["default"],
            )  # fmt: skip
        finally:
            model.peft_config["default"] = config
        # peft adds a model card made of placeholders.
        (folder / "README.md").unlink(missing_ok=True)
        write_record(model, folder)

    def finish(self, folder: Path) -> str:
        """Nothing: an adapter's folder is as it stays."""
        del folder
        return ""

    def late(self, folder: Path) -> dict[str, Tensor]:
        """Return no weights: `load` put them back before the engine spread the model."""
        del folder
        return {}

    def load(self, model: Any, folder: Path) -> None:
        """Overwrite the adapter's weights with those that `save` wrote, bit for bit."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = take_beginnings(model, load_file(folder / "adapter_model.safetensors"))
        result = set_peft_model_state_dict(model, tensors)
        if result.unexpected_keys:
            raise UserError(
                f"{folder} holds parameters this adapter lacks: {result.unexpected_keys[:3]}"
            )

    @contextmanager
    def reference(self, model: Any) -> Iterator[None]:
        """The model as it was before training, and without dropout, inside the block.

        That is without its adapter; or with the one that training went on with, as it was.
        """
        training, started = model.training, self.settings.start is not None
        if started and START not in model.peft_config:
            raise ValueError("the adapter's start was not kept")
        model.eval()
        try:
            with acting_alone(model, START) if started else model.disable_adapter():
                yield
        finally:
            model.train(training)

    def _config(
        self, model: nn.Module, unreached: Sequence[str], added_ids: Sequence[int]
    ) -> LoraConfig:
        wanted = self.settings
        everywhere = wanted.target_modules == "all-linear"
        left_out = [*unreached, *saved_linear(model, wanted.modules_to_save)]
        return LoraConfig(
            r=wanted.rank,
            lora_alpha=wanted.alpha,
            lora_dropout=0.0,  # put there afterwards, where it can be
            # peft adds its own for experts
            rank_pattern=dict(wanted.rank_pattern),
            alpha_pattern=dict(wanted.alpha_pattern),
            use_rslora=wanted.rslora,
            use_dora=wanted.dora,
            target_modules="all-linear" if everywhere else list(wanted.target_modules),
            exclude_modules=left_out if left_out and everywhere else None,
            modules_to_save=list(wanted.modules_to_save) or None,
            bias="none",
            task_type="CAUSAL_LM",
            # GPT-2's layers store their weights [in, out].
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            trainable_token_indices=(
                {name: list(added_ids) for name in embedding_names(model)} if added_ids else None
            ),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what peft says of layers without DoRA into UserError."""
        try:
            yield
        except ValueError as error:
            if not self.settings.dora:
                raise
            raise UserError(
                "lora.dora: the experts of a mixture, whose weights are one tensor, have no DoRA "
                f"({error}). Leave them out of lora.target_modules, or set lora.dora to false."
            ) from None

    def _add_dropout(self, wrapped: Any, log: Log) -> None:
        p, shared = self.settings.dropout, DropoutKeys()
        adapted = [m for m in wrapped.get_base_model().modules() if isinstance(m, LoraLayer)]
        layers = (layer for layer in adapted if not isinstance(layer, ParamWrapper))
        for number, layer in enumerate(layers):
            layer.lora_dropout["default"] = KeyedDropout(p, number, shared)
        experts = adapts_experts(wrapped)
        # peft does not load an adapter of experts that claims to have dropout.
        wrapped.peft_config["default"].lora_dropout = 0.0 if experts else p
        if experts:
            log(
                f"lora.dropout {p} acts on the other layers, not on the experts, whose update is "
                "added to their weights; adapter_config.json says 0, as peft demands"
            )


def wrap_with_saved(model: Any, folder: Path) -> Any:
    """Put a saved adapter around a model that has rows for its tokens; UserError if unfit."""
    check_copies(folder, dict(model.named_parameters(remove_duplicate=False)).get)
    if is_stored(model) and not all(
        update.plain for update in read_updates(folder, model).values()
    ):
        widen(*(m for m in model.modules() if type(m) is nn.Linear))  # peft computes with them
    try:
        with _quiet(), as_float32(model):
            adapted = PeftModel.from_pretrained(model, str(folder))
    except KeyError as error:  # peft's, of a module that was trained as a whole
        raise UserError(f"{folder} does not fit its base model: it lacks {error}") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} does not fit its base model: {error}") from None
    check_fits(adapted, folder)
    return adapted


def switch_adapters(module: nn.Module, *, on: bool) -> None:
    """Let the adapters of a module, and of all within it, act or not."""
    for each in module.modules():
        if is_wrapper(each):
            each.enable_adapters(on)  # type: ignore[operator]


def added_ids_of_folder(folder: Path) -> list[int]:
    """The tokens whose embeddings a saved adapter brings."""
    trained: Any = read_config(folder).trainable_token_indices or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return sorted({index for ids in lists for index in ids})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence peft's warnings about what peft itself does.

    It asks transformers for a property that was renamed, and for mixtures of experts it adds
    patterns of its own, for experts that no target names. Keys of an adapter's configuration that
    peft does not know were checked before; those of its weights are checked after loading.
    """
    with warnings.catch_warnings():
        for message in (
            "Unexpected keyword arguments", "Found missing adapter keys",
            "`is_gradient_checkpointing` is deprecated",
            "The following (rank|alpha)_pattern keys did",
        ):  # fmt: skip
            warnings.filterwarnings("ignore", message=message)
        yield
