"""A saved LoRA adapter: what it adds to which weight."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.model.lora.adapter_config import WITH_PEFT, read_config, read_config_values
from tandem.model.model_folder import first_line
from tandem.model.quantize import read_record
from tandem.model.weight_files import opened

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_MAGNITUDE = ".lora_magnitude_vector"
_KNOWN = rf"(\.lora_[AB]\.weight|{re.escape(_ROWS)}|{re.escape(_MAGNITUDE)}(\.weight)?)$"


@dataclass(frozen=True)
class LowRankUpdate:
    """One module's update: scaling * B @ A, transposed for layers that store [in, out]."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scaling: float
    transposed: bool  # whether the weight is stored [in, out]
    # set if training took a part out of the base and began from it
    start: Literal["pissa", "olora"] | None = None
    magnitude: Tensor | None = None  # DoRA's length of each output's row of the sum [out]

    @property
    def plain(self) -> bool:
        """Whether the sum is the weight and scaling * B @ A, and nothing else."""
        return self.start is None and self.magnitude is None

    def delta(self) -> Tensor:
        """The dense update in float32, in the layout of the base weight."""
        product = (self.b.float() @ self.a.float()) * self.scaling
        return product.T if self.transposed else product

    def added_to(self, weight: Tensor) -> Tensor:
        """The sum of a base weight and the update in float32, in the weight's layout."""
        delta, whole = self.delta(), weight.float()
        if self.start is not None:
            whole = whole - self._taken(whole)
        whole = whole + delta
        if self.magnitude is None:
            return whole
        inputs = 0 if self.transposed else 1
        factor = self.magnitude.float() / whole.norm(dim=inputs)
        return whole * factor.unsqueeze(inputs)

    def _taken(self, weight: Tensor) -> Tensor:
        """The part of a base weight that the adapter began as, as peft takes it out."""
        rank = self.a.shape[0]
        if self.start == "olora":
            q, r = torch.linalg.qr(weight)
            return (q[:, :rank] @ r[:rank]) * self.scaling
        # A transposed matrix has the same largest singular values.
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return (left[:, :rank] * values[:rank]) @ right[:rank]


@dataclass(frozen=True)
class ExpertsUpdate:
    """The updates of all experts of a mixture, whose weights are one tensor in memory."""

    plain = True  # see LowRankUpdate

    a: Tensor  # [experts * rank, in], one expert after the other
    b: Tensor  # [out, rank * experts], the experts within each rank
    scaling: float
    experts: int
    transposed: bool  # whether each one's weight is stored [in, out]

    def of(self, expert: int) -> LowRankUpdate:
        """One expert's update."""
        a = self.a.reshape(self.experts, -1, self.a.shape[1])[expert]
        b = self.b.reshape(self.b.shape[0], -1, self.experts)[:, :, expert]
        return LowRankUpdate(a, b, self.scaling, self.transposed)


@dataclass(frozen=True)
class NewRows:
    """Rows of an embedding in place of the base's: token ids, ascending, and values [n, H]."""

    plain = True  # see LowRankUpdate

    ids: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class WholeWeight:
    """A weight of a module that was trained as a whole, in place of the base's."""

    plain = True  # see LowRankUpdate

    values: Tensor


Update = LowRankUpdate | ExpertsUpdate | NewRows | WholeWeight


def read_updates(adapter: Path, model: Any = None) -> dict[str, Update]:
    """The updates of a LoRA adapter folder by the name of the base weight they belong to.

    Rows of added tokens are among them, and the weights of modules that were trained as a whole;
    copies of the base's weights, which peft may put beside an adapter, are not. Where experts are
    adapted, `model` is the base, its weights on any device.

    Raises UserError for adapters whose effect is not a plain low-rank update of weights.
    """
    config = read_config(adapter)
    updates: dict[str, Update] = {}
    record = read_record(adapter)
    with _opened(adapter) as file:
        names = set(file.names)
        for name in sorted(n for n in names if n.endswith(".lora_A.weight")):
            module = name.removesuffix(".lora_A.weight")
            partner = f"{module}.lora_B.weight"
            if partner not in names:
                raise UserError(f"{file.path}: {name} has no lora_B beside it")
            target = module.removeprefix(_PREFIX)
            a, b = file.tensor(name), file.tensor(partner)
            if (wrapped := _wrapped(target, config, model)) is not None:
                updates[wrapped[0]] = _experts(a, b, config, *wrapped)
                continue
            scaling, weight = _scaling(config, target, a.shape[0]), f"{target}.weight"
            # peft sees a quantised layer as [out, in] even where its weight is stored transposed.
            turned = config.fan_in_fan_out or (record is not None and weight in record.transposed)
            length = {f"{module}{_MAGNITUDE}", f"{module}{_MAGNITUDE}.weight"} & names
            updates[weight] = LowRankUpdate(
                a, b, scaling, bool(turned), _start(config),
                file.tensor(min(length)) if length else None,
            )  # fmt: skip
        for name in sorted(n for n in names if n.endswith(_ROWS)):
            module = name.removesuffix(_ROWS).removeprefix(_PREFIX)
            ids = _row_ids(config, module)
            values = file.tensor(name)
            if len(ids) != len(values):
                raise UserError(f"{file.path}: {name} has {len(values)} rows for {len(ids)} tokens")
            updates[f"{module}.weight"] = NewRows(ids, values)
        for name in sorted(file.saved):
            updates[name.removeprefix(_PREFIX)] = WholeWeight(file.tensor(name))
    return updates


def require_plain(adapter: Path) -> None:
    """Raise UserError unless an adapter is a plain low-rank update, by its config and names."""
    read_config(adapter)
    with _opened(adapter):
        pass


def update_names(adapter: Path) -> list[str]:
    """The names of the tensors in an adapter's file, copies of the base's weights left out."""
    with _opened(adapter) as file:
        return sorted(set(file.names) - file.copies)


def read_tensors(adapter: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's file by their names there, copies left out."""
    with _opened(adapter) as file:
        return {name: file.tensor(name) for name in set(file.names) - file.copies}


def copied_weights(adapter: Path) -> dict[str, Tensor]:
    """Copies of the base's weights in an adapter's file, by their names in the base.

    peft puts embeddings there.
    """
    with _opened(adapter) as file:
        return {name.removeprefix(_PREFIX): file.tensor(name) for name in sorted(file.copies)}


def check_copies(adapter: Path, own: Callable[[str], Tensor | None]) -> list[str]:
    """The names of the copies in an adapter's file; UserError for one unlike the base's weight.

    `own` gives the base's weights by their names.
    """
    copies = copied_weights(adapter)
    for name, values in copies.items():
        weight = own(name)
        if weight is None or not _same(weight.detach(), values):
            raise UserError(
                f"{adapter} holds {name} as a whole, and other values than its base: it trained "
                f"whole modules as well. {WITH_PEFT}."
            )
    return list(copies)


def _same(own: Tensor, copy: Tensor) -> bool:
    """Whether two weights are equal in the narrower one's number format."""
    if own.shape != copy.shape:
        return False
    dtype = min(own.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.cpu().to(dtype), copy.to(dtype))


def _of_the_base(names: Iterable[str]) -> set[str]:
    """The names that are those of weights of a base."""
    inner = r"\.(lora_|token_adapter\.|modules_to_save\.|base_layer\.)"
    return {n for n in names if n.startswith(_PREFIX) and not re.search(inner, n)}


def _wrapped(target: str, config: Any, model: Any) -> tuple[str, Any, bool] | None:
    """Find the parameter that an entry of an adapter's file adapts by itself.

    peft wraps a module once for each of its parameters, the first one innermost: `target` is the
    wrapper's name, with a `.base_layer` for each wrapper around it.

    Returns the parameter's name, itself, and whether its experts' weights are stored [in, out];
    None where the entry is of a module.
    """
    wanted = config.target_parameters or ()
    if wanted and model is None:
        raise ValueError("the updates of an adapter with target_parameters need the base")
    path = re.sub(r"(\.base_layer)+$", "", target)
    depth = target.count(".base_layer")
    module = dict(model.named_modules()).get(path) if wanted else None
    if module is None:
        return None
    named = {f"{path}.{name}": each for name, each in module.named_parameters(recurse=False)}
    fit = [name for name in named if any(f".{name}".endswith(f".{key}") for key in wanted)]
    if depth >= len(fit):
        return None
    name = fit[len(fit) - 1 - depth]
    return name, named[name], bool(getattr(module, "is_transposed", False))


def _experts(
    a: Tensor, b: Tensor, config: Any, name: str, weight: Any, transposed: bool
) -> LowRankUpdate | ExpertsUpdate:
    experts = weight.shape[0] if weight.dim() == 3 else 1
    scaling = _scaling(config, name, a.shape[0] // experts)
    if weight.dim() == 2:
        return LowRankUpdate(a, b, scaling, False)
    return ExpertsUpdate(a, b, scaling, experts, transposed)


def _start(config: Any) -> Literal["pissa", "olora"] | None:
    """The initialisation of an adapter that changed its base and can be computed again."""
    named = config.init_lora_weights
    if named == "pissa":
        return "pissa"
    return "olora" if isinstance(named, str) and named.lower() == "olora" else None


def _scaling(config: Any, target: str, rank: int) -> float:
    """The factor on B @ A of a module or parameter: alpha / rank, or / sqrt(rank) with rsLoRA."""
    patterns = (config.alpha_pattern or {}).items()
    own = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", target))
    alpha = next(own, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _row_ids(config: Any, module: str) -> tuple[int, ...]:
    trained: Any = config.trainable_token_indices or []
    if isinstance(trained, dict):
        trained = next((ids for name, ids in trained.items() if module.endswith(name)), [])
    return tuple(trained)


class _Tensors:
    """An open file of an adapter's tensors; UserError for some that are no low-rank update."""

    def __init__(self, path: Path, source: Any) -> None:
        self.path = path
        self._source = source
        self.names: list[str] = list(source.keys())
        whole = read_config_values(path.parent).get("modules_to_save") or ()
        of_the_base = _of_the_base(self.names)
        # weights of modules that were trained as a whole
        self.saved = (
            {name for name in of_the_base if name.rpartition(".")[0].endswith(tuple(whole))}
            if whole
            else set[str]()
        )
        self.copies = {n for n in of_the_base - self.saved if n.endswith(".weight")}
        if any(".lora_embedding_" in name for name in self.names):
            raise UserError(
                f"{path.parent} changes embeddings by low-rank updates, which tandem does not add. "
                f"{WITH_PEFT}."
            )
        strange = {name for name in self.names if not re.search(_KNOWN, name)}
        if strange := strange - self.saved - self.copies:
            raise UserError(f"{path} holds tensors that are no LoRA update: {sorted(strange)[:3]}")

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        read = getattr(self._source, "get_tensor", None)
        return self._source[name] if read is None else read(name)


@contextmanager
def _opened(adapter: Path) -> Iterator[_Tensors]:
    """The adapter's tensors: safetensors, or torch's own format as older trainers write it."""
    path = adapter / "adapter_model.safetensors"
    if path.exists():
        with opened(path) as file:
            yield _Tensors(path, file)
        return
    path = adapter / "adapter_model.bin"
    if not path.exists():
        raise UserError(
            f"{adapter} has no adapter_model.safetensors: its training is not finished, or it was "
            "copied in part"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how a file that is then refused was pickled
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles lead anywhere
        raise UserError(
            f"{path} cannot be read: {first_line(error)} Convert it where it was made, with peft's "
            "save_pretrained, which writes adapter_model.safetensors."
        ) from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds no tensors by name. Copy the adapter again.")
    yield _Tensors(path, tensors)
