"""LoRA adapters through peft: injection, saving, loading, switching off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError
from tandem.model.added_tokens import embedding_names, make_missing_rows
from tandem.model.cpu.onednn_linear import low_rank_product, takes_frozen
from tandem.model.keyed_dropout import DropoutKeys, KeyedDropout
from tandem.model.lora.adapter_config import read_config
from tandem.model.lora.adapter_folder import check_copies, update_names
from tandem.model.quantize import load_bitsandbytes, write_record

load_bitsandbytes()  # peft would import it less quietly

from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

# Model types whose `out_proj` peft does not adapt, because fused kernels read its weight.
_FUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | str,
    base_name: str,
    seed: int,
    out_of_reach: Sequence[str] = (),
    added_ids: Sequence[int] = (),
) -> Any:
    """Wrap a model with a fresh LoRA adapter (arXiv 2106.09685); B starts at zero.

    Args:
        model: a transformers causal language model; its weights are frozen.
        rank, alpha: the update is (alpha / rank) * B @ A.
        dropout: on the adapter's input, with masks that do not depend on the schedule. A mixture's
            experts have none, see `adapts_experts`.
        target_modules: endings of module names, or "all-linear".
        base_name: what the saved adapter names as its base.
        seed: seeds A.
        out_of_reach: modules that all-linear leaves out; see `modules_out_of_reach`.
        added_ids: tokens whose embeddings are trained as well, from the rows that are there.

    Raises UserError if a target fits no module of the model, or one out of reach.
    """
    targets: Any = target_modules if isinstance(target_modules, str) else list(target_modules)
    if isinstance(targets, list):
        check_targets(model, targets, out_of_reach)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # put there below, where it can be
        target_modules=targets,
        exclude_modules=list(out_of_reach) if out_of_reach and targets == "all-linear" else None,
        bias="none",
        task_type="CAUSAL_LM",
        # GPT-2's layers store their weights [in, out].
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=(
            {name: list(added_ids) for name in embedding_names(model)} if added_ids else None
        ),
    )
    torch.manual_seed(seed)
    with _quiet():
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    if dropout > 0:
        _key_dropout(wrapped.get_base_model(), dropout)
        # peft does not load an adapter of experts that claims to have dropout.
        wrapped.peft_config["default"].lora_dropout = 0.0 if adapts_experts(wrapped) else dropout
    _fuse(wrapped.get_base_model())
    if added_ids:
        _look_up_few(wrapped.get_base_model().get_input_embeddings().token_adapter)
    return wrapped


def modules_out_of_reach(model: Any) -> list[str]:
    """Linear layers whose weights a model reads without calling them, or whose kernels may.

    An adapter on one of them would change nothing, and learn nothing. State-space mixers have
    such layers: a projection of the time step that is multiplied by hand, and an output
    projection that their fused kernels take in, which peft refuses to adapt. Routers that are a
    linear layer and more cannot be adapted, either. Experts are not looked at, for a few tokens
    do not reach them all. The model still attends by itself.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "expert" not in name
    }
    called: set[nn.Module] = {model.get_output_embeddings()}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # a router returns more than a product
            called.add(module)

    handles = [module.register_forward_hook(note) for module in linear.values()]
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=model.device)[None]
            # Without a mask transformers looks at positions for packed texts, which takes numbers.
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    refused = set(refused_modules(model))
    return [name for name, module in linear.items() if module not in called or name in refused]


def refused_modules(model: Any) -> list[str]:
    """Those of `modules_out_of_reach` that peft would not adapt; told by their names."""
    if model.config.model_type not in _FUSED:
        return []
    return [name for name, _ in model.named_modules() if name.endswith(".out_proj")]


def load_adapter(model: Any, folder: Path) -> Any:
    """Wrap a model with a saved adapter; a model without its added tokens grows by them.

    Raises UserError if the folder's adapter does not fit the model, or is no plain LoRA.
    """
    make_missing_rows(model, added_ids_of_folder(folder))
    check_copies(folder, model)
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} does not fit its base model: {error}") from None
    # peft ignores tensors without a layer, and only warns of layers without a tensor.
    if not getattr(model, "_checkpoint_conversion_mapping", None):
        taken = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        brought = set(update_names(folder))
        if strange := sorted(taken ^ brought):
            whose = "the adapter" if strange[0] in brought else "the model"
            raise UserError(
                f"{folder} does not fit its base model: only {whose} has {strange[0]} (and "
                f"{len(strange) - 1} more). Is this the model it was trained on?"
            )
    return adapted


def added_ids_of_folder(folder: Path) -> list[int]:
    """The tokens whose embeddings a saved adapter brings."""
    found: Any = read_config(folder).trainable_token_indices or []
    lists = found.values() if isinstance(found, dict) else [found]
    return sorted({index for ids in lists for index in ids})


def save_adapter(model: Any, folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder`.

    Where the base is quantised, quantization.json says so.

    Args:
        model: adapter-wrapped; its own weights may be spread over processes.
        folder: is there.
        trained: the adapter's weights, whole, by the names of `trainable_parameters`.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    # peft adds a model card made of placeholders.
    (folder / "README.md").unlink(missing_ok=True)
    write_record(model, folder)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Overwrite the trainable parameters with those that `save_adapter` wrote, bit for bit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    if result.unexpected_keys:
        raise UserError(
            f"{folder} holds parameters this adapter lacks: {result.unexpected_keys[:3]}"
        )


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward instead of keeping them.

    Raises UserError for models that cannot.
    """
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: {type(base).__name__} cannot recompute its activations; "
            "set it to false and lower tokens_per_microbatch instead"
        )
    base.enable_input_require_grads()
    kwargs = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(kwargs)
    else:  # its name in earlier transformers
        base.gradient_checkpointing_enable(kwargs)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapter, and without dropout, inside the block."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)


def adapts_experts(model: nn.Module) -> bool:
    """Whether parameters are adapted by themselves, as a mixture's experts are.

    Their update is added to the weights before an input is known, so that dropout, which acts on an
    adapter's input, cannot act there.
    """
    return any(isinstance(module, ParamWrapper) for module in model.modules())


def adapted_weights(model: nn.Module) -> list[str]:
    """The names that a model's weights had before it was wrapped, of those that adapters change."""
    found = []
    for name, module in model.named_modules():
        own = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            found.append(f"{own.replace('.base_layer', '')}.{module.parameter_name}")
        elif isinstance(module, LoraLayer) or hasattr(module, "token_adapter"):
            found.append(f"{own}.weight")
    return found


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings about what peft itself does.

    It asks transformers for a property that was renamed, and for mixtures of experts it adds
    patterns of its own, for experts that no target names. Keys of an adapter's configuration that
    peft does not know were judged before; those of its weights are judged after loading.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did")
        yield


def _fuse(base: nn.Module) -> None:
    """Let adapted linear layers add the low-rank part inside its product where that is faster."""
    for layer in base.modules():
        if isinstance(layer, LoraLayer):
            layer._cast_input_dtype = partial(_as_it_is, layer._cast_input_dtype)
        if isinstance(layer, LoraLinear) and type(layer.base_layer) is nn.Linear:
            layer.forward = partial(_adapted, layer, layer.forward)


def _as_it_is(cast: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's input without peft's cast to its float32, which autocast would take back."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    result: Tensor = cast(x, dtype)
    return result


def _adapted(layer: Any, plain: Any, x: Tensor) -> Tensor:
    simple = list(layer.active_adapters) == ["default"] and not layer.lora_variant
    if (
        layer.disable_adapters
        or layer.merged
        or not simple
        or not takes_frozen(x, layer.base_layer)
    ):
        result: Tensor = plain(x)
        return result
    return low_rank_product(
        x,
        layer.lora_dropout["default"](x),
        layer.base_layer,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
    )


def _look_up_few(layer: Any) -> None:
    """Let an embedding put its trained rows where they are fed.

    peft puts them into a copy of the whole matrix at each forward, and makes a gradient of its
    size at each backward. Embeddings that do more than look up stay with that.
    """
    if type(layer.base_layer) is nn.Embedding and layer.base_layer.max_norm is None:
        layer.forward = partial(_looked_up, layer, layer.forward)


def _looked_up(layer: Any, plain: Any, ids: Tensor) -> Tensor:
    if layer.disable_adapters or layer.merged or list(layer.active_adapters) != ["default"]:
        result: Tensor = plain(ids)
        return result
    frozen = F.embedding(ids, layer.base_layer.weight)
    trained = layer.trainable_tokens_delta["default"].to(frozen.dtype)
    same = ids[..., None] == torch.tensor(layer.token_indices["default"], device=ids.device)
    rows = F.embedding(same.int().argmax(dim=-1), trained)
    return torch.where(same.any(dim=-1)[..., None], rows, frozen)


def _key_dropout(base: nn.Module, p: float) -> None:
    shared = DropoutKeys()
    base.tandem_dropout = shared  # type: ignore[assignment]
    layers = [
        module
        for module in base.modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    ]
    for number, layer in enumerate(layers):
        layer.lora_dropout["default"] = KeyedDropout(p, number, shared)


def check_targets(
    model: nn.Module,
    targets: Sequence[str],
    out_of_reach: Sequence[str] = (),
    key: str = "lora.target_modules",
) -> None:
    """Raise UserError, which calls them `key`, unless each target fits linear layers alone.

    They are neither out of reach nor the output head, whose scores are not computed as a layer's.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    modules = dict(model.named_modules())
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name not in out_of_reach
    }
    its = f"its linear layers are {', '.join(sorted(linear))}"
    kind = type(model).__name__
    for target in targets:
        fit = [name for name in modules if name == target or name.endswith("." + target)]
        if not fit:
            raise UserError(f"{key}: {target!r} fits no module of {kind}; {its}")
        for name in fit:
            if modules[name] is head:
                raise UserError(
                    f"{key}: {target!r} is the output head of {kind}, which takes no adapter; "
                    f"leave it out; {its}"
                )
            if not isinstance(modules[name], nn.Linear | Conv1D):
                raise UserError(
                    f"{key}: {target!r} fits {name}, which is {type(modules[name]).__name__}, and "
                    f"adapters are for linear layers; {its}"
                )
            if name in out_of_reach:
                raise UserError(
                    f"{key}: {target!r} fits {name}, which {kind} does not use as a plain product, "
                    "so an adapter there would do nothing; leave it out"
                )
