"""Which layers of a model an adapter may go to, and which it went to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError
from tandem.model.quantize import load_bitsandbytes

load_bitsandbytes()  # before peft does, which would print its messages

from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper  # noqa: E402

# Model types whose `out_proj` peft does not adapt, because fused kernels read its weight.
_FUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def unreached_layers(model: Any) -> list[str]:
    """Linear layers whose weights a model, or a fused kernel, reads without calling them.

    An adapter there would change nothing. State-space mixers have such layers: a projection of the
    time step that is multiplied by hand, and an output projection that their fused kernels take in.
    Routers that are a linear layer and more cannot be adapted, either. Experts are not looked at:
    a few tokens do not reach them all. The model must still have its own attention.
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
            # Without a mask, transformers reads the values of positions, which a meta device lacks.
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    refused = set(refused_modules(model))
    return [name for name, module in linear.items() if module not in called or name in refused]


def refused_modules(model: Any) -> list[str]:
    """Those of `unreached_layers` that peft would not adapt; by their names."""
    if model.config.model_type not in _FUSED:
        return []
    return [name for name, _ in model.named_modules() if name.endswith(".out_proj")]


def check_targets(
    model: nn.Module,
    targets: Sequence[str],
    unreached: Sequence[str] = (),
    key: str = "lora.target_modules",
) -> None:
    """Raise UserError, which calls them `key`, unless each target fits linear layers alone.

    The output head does not count: `output_head` computes its log-probs without calling it.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    modules, kind = dict(model.named_modules()), type(model).__name__
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in unreached
    }
    its = f"its linear layers are {', '.join(sorted(linear))}"
    for target in targets:
        fit = [name for name in modules if name == target or name.endswith("." + target)]
        why = "" if fit else f"fits no module of {kind}; {its}"
        for name in fit:
            module = modules[name]
            if module is head:
                why = f"is the output head of {kind}, which takes no adapter; leave it out; {its}"
            elif not isinstance(module, nn.Linear | Conv1D):
                why = (
                    f"fits {name}, which is {type(module).__name__}, and adapters are for linear "
                    f"layers; {its}"
                )
            elif name in unreached:
                why = (
                    f"fits {name}, which {kind} does not use as a plain product, so an adapter "
                    "there would do nothing; leave it out"
                )
            if why:
                break
        if why:
            raise UserError(f"{key}: {target!r} {why}")


def check_patterns(model: nn.Module, key: str, patterns: Iterable[str]) -> None:
    """Raise UserError unless each pattern of names decides for an adapted layer, as peft matches.

    Of several that fit a layer the first decides. `key` is that of the section `lora`.
    """
    names = adapted_names(model)
    fitting = {name: _fitting(patterns, name) for name in names}
    for pattern in patterns:
        if any(fit[:1] == [pattern] for fit in fitting.values()):
            continue
        for name, fit in fitting.items():
            if pattern in fit:
                raise UserError(
                    f"lora.{key}: {pattern!r} decides nothing, because {fit[0]!r} stands before it "
                    f"and fits {name}, too; put the narrower one first"
                )
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(
            f"lora.{key}: {pattern!r} fits no adapted layer; the adapted layers are "
            f"{', '.join(ends)}, and a pattern is the end of a name from a dot on, such as "
            f"{names[0].split('.', 1)[-1]}"
        )


def without_order(model: nn.Module, patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns that say the same in any order; peft sorts them when it saves an adapter.

    Where several fit one layer, each layer gets a pattern of its own, which is its whole name.
    """
    fitting = {name: _fitting(patterns, name) for name in adapted_names(model)}
    if all(len(fit) <= 1 for fit in fitting.values()):
        return dict(patterns)
    return {re.escape(name): patterns[fit[0]] for name, fit in fitting.items() if fit}


def _fitting(patterns: Iterable[str], name: str) -> list[str]:
    """The patterns that fit a name, as peft matches them."""
    return [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)]


def adapts_experts(model: nn.Module) -> bool:
    """Whether parameters are adapted by themselves, as a mixture's experts are.

    Their update is added to the weights before an input is known, so that dropout, which acts on an
    adapter's input, cannot act there.
    """
    return any(isinstance(module, ParamWrapper) for module in model.modules())


def adapted_weights(model: nn.Module) -> list[str]:
    """The names that a model's weights had before it was wrapped, of those that adapters change."""
    names = []
    for name, module in model.named_modules():
        own = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            names.append(_parameter_name(own, module))
        elif isinstance(module, LoraLayer) or hasattr(module, "token_adapter"):
            names.append(f"{own}.weight")
        elif isinstance(module, ModulesToSaveWrapper):
            names += [f"{own}.{each}" for each, _ in module.original_module.named_parameters()]
    return names


def adapted_names(model: nn.Module) -> list[str]:
    """The names by which peft matches patterns: of adapted layers, and of adapted parameters."""
    names = []
    for name, module in model.named_modules():
        own = name.removeprefix("base_model.model.")
        if isinstance(module, LoraLayer):
            names.append(_parameter_name(own, module) if isinstance(module, ParamWrapper) else own)
    return names


def _parameter_name(wrapper: str, module: Any) -> str:
    """The name of an adapted parameter; its module has a wrapper around it for each of them."""
    return f"{wrapper.replace('.base_layer', '')}.{module.parameter_name}"
