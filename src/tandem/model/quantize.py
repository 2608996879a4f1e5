"""A frozen base in 4 bits under an adapter (QLoRA, arXiv 2305.14314), through bitsandbytes.

An adapter learns on top of the rounded weights, so what was rounded, and how, stays with it: in
`quantization.json` in the adapter's folder.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError, require
from tandem.model.model_folder import QUANTIZATION
from tandem.model.unwrap import plain_model
from tandem.storage.atomic_files import atomic_write_json, read_json

_BLOCK = 64
# The logger that reports a kernel missing on the Hub.
_LOGGER = "bitsandbytes.backends.cpu.ops"


@dataclass(frozen=True)
class Quantized:
    """Which weights of a base are 4-bit, and the number format that they were rounded from."""

    format: str  # nf4, with the blocks' scales quantised as well
    dtype: str
    weights: tuple[str, ...]
    transposed: tuple[str, ...] = ()  # those of them that are stored [in, out]

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    def rounded(self, name: str, weight: Tensor, device: torch.device) -> Tensor:
        """A stored weight as the adapter saw it, in float32 on the CPU, in its stored layout.

        Rounding gives the same bits on the same kind of device.
        """
        if name not in self.weights:
            return weight
        turned = name in self.transposed
        whole = weight.to(self.torch_dtype)
        layer = _layer(whole.T if turned else whole, None, whole.dtype, device)
        rows = dequantized(layer).float().cpu()
        return rows.T if turned else rows


def check_quantization(quantization: str | None, *, device: str, sharded: bool) -> None:
    """Raise UserError where a base cannot be quantised, before anything is read."""
    if quantization is None:
        return
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"quantization: {quantization} is not supported on {device}, only on cuda and, "
            "slowly, cpu; set it to null"
        )
    if sharded:
        raise UserError(
            f"quantization: {quantization} does not go with an engine that shards the base, whose "
            "4-bit weights cannot be cut; use engine: ddp or deepspeed-zero2, or set it to null"
        )
    _bitsandbytes()


class Quantizer:
    """Puts a model's linear layers on a device in 4 bits, some modules at a time.

    The output head, embeddings and norms stay as they are; so do layers that are more than a linear
    one, the experts that transformers keeps in one tensor, and the modules that `kept` names.
    """

    def __init__(
        self,
        model: Any,
        *,
        source: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
        kept: Collection[str] = (),
    ) -> None:
        """
        Args:
            model: without an adapter; its weights may come later.
            source, compute: number formats that weights are rounded from, and of products.
        """
        self._model, self._source, self._compute, self._device = model, source, compute, device
        head = model.get_output_embeddings()
        self._names = {
            id(module): name
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, Conv1D) and module is not head and name not in kept
        }
        self._weights: list[str] = []
        self._transposed: list[str] = []

    def quantize(self, modules: Iterable[nn.Module]) -> None:
        """Replace those of some modules, which have their weights, that are linear layers."""
        for module in list(modules):
            if (name := self._names.get(id(module))) is None:
                continue
            layer: Any = module
            turned = isinstance(layer, Conv1D)
            weight = layer.weight.detach().to(self._source)
            made = _layer(weight.T if turned else weight, layer.bias, self._compute, self._device)
            parent, _, own = name.rpartition(".")
            setattr(self._model.get_submodule(parent), own, made)
            self._weights.append(f"{name}.weight")
            self._transposed += [f"{name}.weight"] if turned else []

    def finish(self) -> None:
        """Note on the model what was done; UserError where nothing could be."""
        if not self._weights:
            raise UserError(
                f"quantization: {type(self._model).__name__} has no linear layers that can be "
                "quantised"
            )
        # This tells peft which of its layers fit.
        self._model.is_loaded_in_4bit = True
        order = {f"{name}.weight": number for number, name in enumerate(self._names.values())}
        self._model.tandem_quantized = Quantized(
            "nf4",
            str(self._source).removeprefix("torch."),
            tuple(sorted(self._weights, key=order.__getitem__)),
            tuple(sorted(self._transposed, key=order.__getitem__)),
        )


def quantize(model: Any, **how: Any) -> None:
    """Put a whole model's linear layers in 4 bits, in place; see `Quantizer` for the arguments.

    Raises UserError without bitsandbytes, or when there is nothing to quantise.
    """
    quantizer = Quantizer(model, **how)
    quantizer.quantize(model.modules())
    quantizer.finish()


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] that a 4-bit layer multiplies with, in what it was rounded from."""
    functional = _bitsandbytes().functional
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def quantized_of(model: Any) -> Quantized | None:
    """What `quantize` did to a model, adapters around it or not."""
    return getattr(plain_model(model), "tandem_quantized", None)


def write_record(model: Any, folder: Path) -> None:
    """Note in an adapter's folder that its base is quantised, if it is."""
    if (record := quantized_of(model)) is not None:
        atomic_write_json(folder / QUANTIZATION, asdict(record))


def read_record(folder: Path) -> Quantized | None:
    """What `write_record` noted, None for an unquantised base; UserError for a damaged file."""
    path = folder / QUANTIZATION
    if not path.exists():
        return None
    try:
        values = read_json(path)
        names = tuple(values["weights"]), tuple(values["transposed"])
        record = Quantized(values["format"], values["dtype"], *names)
        if record.format != "nf4" or not isinstance(record.torch_dtype, torch.dtype):
            raise ValueError(f"unknown format {record.format!r} or dtype {record.dtype!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error}. Copy the adapter again.") from None
    return record


def load_bitsandbytes() -> Any:
    """Import the package without its messages and downloads; None where it is not installed.

    On import it looks for kernels on the Hub, and prints a line when it finds none. peft imports it
    wherever it is installed, so call this before peft is imported. It also compiles functions that
    few runs call; the compiler, whose import takes seconds, is left until one is called.
    """
    if find_spec("bitsandbytes") is None:
        return None
    logger = logging.getLogger(_LOGGER)
    # None in place of a module lets its import fail, installed or not.
    there, disabled = sys.modules.get("kernels"), logger.disabled
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.disabled = True
    compiler = torch.compile
    torch.compile = _compiled_when_called  # type: ignore[assignment]
    try:
        import bitsandbytes
    finally:
        torch.compile = compiler
        logger.disabled = disabled
        del sys.modules["kernels"]
        if there is not None:
            sys.modules["kernels"] = there
    return bitsandbytes


def _compiled_when_called(function: Any = None, **options: Any) -> Any:
    """In place of `torch.compile`, as a function or a decorator."""
    if function is None:
        return partial(_compiled_when_called, **options)

    @cache
    def compiled() -> Any:
        return torch.compile(function, **options)

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return compiled()(*given, **named)

    return call


def _bitsandbytes() -> Any:
    require("bitsandbytes", "quant", "quantization: nf4")
    return load_bitsandbytes()


def _layer(
    weight: Tensor, bias: Tensor | None, compute: torch.dtype, device: torch.device
) -> nn.Linear:
    """A 4-bit layer of weight [out, in] on `device`."""
    library = _bitsandbytes()
    kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    rows, columns = weight.shape
    layer: Any = library.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=compute, device="meta", **kind
    )
    values = weight.detach().contiguous()
    layer.weight = library.nn.Params4bit(
        values, requires_grad=False, blocksize=_BLOCK, module=layer, **kind
    ).to(device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    # On some CPUs its forward would, where no gradient is asked for, pack the weight for a
    # bfloat16 kernel, for good: the reference would be rounded in another way than the policy,
    # and later gradients would be lost.
    layer.support_avx512bf16_for_cpu = False
    return layer.eval()
