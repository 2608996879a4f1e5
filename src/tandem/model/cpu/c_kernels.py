"""The C kernels: compiled for this processor when first needed, kept in the cache, loaded once."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.storage.cache_folder import cache_folder

# off takes torch's own operators, for comparisons or where a compiler is broken.
_VARIABLE = "TANDEM_KERNELS"

_SOURCES = (
    "vectors.h", "narrow.h", "attention.c", "elementwise.c", "low_rank_sum.c", "slim_product.c",
)  # fmt: skip
# No -ffast-math: infinities and NaN must stay what they are.
_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120


@dataclass(frozen=True)
class Kernels:
    """The loaded library; `lanes` is the number of floats in a vector of this processor."""

    functions: ctypes.CDLL
    lanes: int

    def call(self, name: str, *arguments: Tensor | int | float) -> None:
        """Call a function by its name; the number of threads comes after all others."""
        values = [_c_value(argument) for argument in (*arguments, torch.get_num_threads())]
        getattr(self.functions, name)(*values)


def _c_value(argument: Tensor | int | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def kernels() -> Kernels | None:
    """The library, or None where it cannot be had; `unavailable_reason` says why."""
    return None if _switched_off() else _load()[0]


def unavailable_reason() -> str:
    """Why `kernels` is None here, in words; empty when it is not."""
    return f"{_VARIABLE}=off" if _switched_off() else _load()[1]


def numerics() -> str:
    """What float32 on this CPU is computed with, for whoever compares bits."""
    library = kernels()
    return "torch" if library is None else f"C, {library.lanes} lanes"


def _switched_off() -> bool:
    value = os.environ.get(_VARIABLE, "on")
    if value not in ("on", "off"):
        raise UserError(f"{_VARIABLE} is {value!r}, but it must be on or off")
    return value == "off"


@functools.cache
def _load() -> tuple[Kernels | None, str]:
    if sys.platform != "linux":
        return None, f"they are not built on {sys.platform}"
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) is installed"
    try:
        functions = _loaded(compiler)
        functions.tandem_lanes.restype = ctypes.c_int64
        return Kernels(functions, int(functions.tandem_lanes())), ""
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return None, f"{compiler} failed: {lines[0] if lines else error}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return None, f"{compiler}: {error}"


def _loaded(compiler: str) -> ctypes.CDLL:
    """The library of the cache; one for this process where that cannot be written, or executed."""
    # On a full disk the linker fails, and with it the compiler.
    with suppress(OSError, AttributeError, subprocess.CalledProcessError):
        kept = ctypes.CDLL(str(_built(compiler, cache_folder() / "kernels")))
        _ = kept.tandem_lanes
        return kept
    with tempfile.TemporaryDirectory(prefix="tandem-kernels-") as folder:
        return ctypes.CDLL(str(_built(compiler, Path(folder))))


def _built(compiler: str, folder: Path) -> Path:
    """The library file in a folder, compiled unless it is there for these sources and this CPU."""
    here = Path(__file__).parent / "kernels"
    # ARM's compilers call it -mcpu.
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler.split(), native, *_FLAGS]
    version = _run([*compiler.split(), "--version"])
    digest = hashlib.sha256("\0".join([*command, version, _processor()]).encode())
    for source in _SOURCES:
        digest.update((here / source).read_bytes())
    name = digest.hexdigest()[:32]
    for kept in folder.glob(f"{name}-*.so"):
        if kept.name == _named(name, kept):
            return kept
        kept.unlink()  # damaged: it could compute anything, or end the process
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place, for several processes may build at once.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as aside:
        library = Path(aside) / "library.so"
        code = [str(here / source) for source in _SOURCES if source.endswith(".c")]
        _run([*command, *code, "-o", str(library), "-lm"])
        return library.replace(folder / _named(name, library))


def _named(name: str, library: Path) -> str:
    """The file name of a library: `name`, which says what it was made of, and its checksum."""
    return f"{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout


def _processor() -> str:
    """What -march=native looks at: home folders may be shared by different processors."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> _Rows:
        """[1, heads, T, D] of any strides but the last."""
        return cls(tensor.data_ptr(), tensor.stride(2), tensor.stride(1))


class _Attention(ctypes.Structure):
    """The struct of attention.c, field by field."""

    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "depth")),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("trees", ctypes.c_void_p),
        ("tree_count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def usable(kernels: Kernels | None, *tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32, on CPU, their last dimension in vectors."""
    return kernels is not None and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.shape[-1] % kernels.lanes == 0
        for t in tensors
    )


@dataclass(frozen=True)
class TreeAttentionCall:
    """What a call of `TreeAttention` needs beside the projections."""

    kernels: Kernels
    segments: Tensor  # [n, 4] int64: start, stop, prefix_start, prefix_stop
    trees: Tensor  # [trees + 1] int64: where each tree's segments begin
    scale: float  # factor on the scores
    window: int | None  # positions that a query sees back, itself included; None: all

    def struct(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> _Attention:
        """The struct of attention.c without gradients; the tensors must outlive it."""
        call = _Attention()
        call.q, call.k, call.v = _Rows.of(query), _Rows.of(key), _Rows.of(value)
        call.out, call.lse = _Rows.of(output.transpose(1, 2)), lse.data_ptr()
        call.segments, call.trees = self.segments.data_ptr(), self.trees.data_ptr()
        call.heads, call.rows, call.depth = query.shape[1:]
        call.key_heads, call.tree_count = key.shape[1], len(self.trees) - 1
        call.scale, call.window = self.scale, self.window or 0
        call.threads = torch.get_num_threads()
        return call


class TreeAttention(torch.autograd.Function):
    """Attention over trees; the rows that each segment sees are those of `collate.Segment`."""

    @staticmethod
    def forward(
        ctx: Any,
        call: TreeAttentionCall,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, key_value_heads, T, D]
        value: Tensor,
    ) -> Tensor:
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        _, heads, rows, depth = query.shape
        output = query.new_empty(1, rows, heads, depth)
        lse = query.new_empty(heads, rows)
        ctx.call = call
        ctx.save_for_backward(query, key, value, output, lse)
        struct = call.struct(query, key, value, output, lse)
        call.kernels.functions.tandem_attention_forward(ctypes.byref(struct))
        return output  # [1, T, heads, D]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grads = [t.new_empty(1, t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value)]
        struct = ctx.call.struct(query, key, value, output, lse)
        struct.d_out = _Rows.of(grad_output.transpose(1, 2))
        struct.d_q, struct.d_k, struct.d_v = (_Rows.of(g.transpose(1, 2)) for g in grads)
        ctx.call.kernels.functions.tandem_attention_backward(ctypes.byref(struct))
        return None, *(g.transpose(1, 2) for g in grads)


# What kernels for stored weights call their dtypes.
_STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def slim_product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x @ weight.T of a few rows [..., K] and a matrix [N, K], which is read once; see the C file.

    None where the kernel cannot: it takes float32 rows and contiguous matrices of three dtypes.
    """
    found = _for_stored("tandem_slim", weight)
    if found is None or x.dtype != torch.float32:
        return None
    (library, name), columns = found, x.shape[-1]
    rows = x.reshape(-1, columns).contiguous()
    out = x.new_empty(len(rows), len(weight))
    library.call(name, rows, weight, out, len(rows), len(weight), columns)
    return out.view(*x.shape[:-1], len(weight))


def low_rank_sum(
    weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """weight + scale * b @ a in the weight's dtype, and the sums of squares of its rows [N].

    `weight` is [N, K], `a` [r, K] and `b` [N, r]; None where the kernel cannot, see `slim_product`.
    """
    found = _for_stored("tandem_low_rank_sum", weight)
    if found is None:
        return None
    library, name = found
    vectors = a.float().view(len(a), -1, library.lanes).transpose(0, 1).contiguous()
    b = b.float().contiguous()
    merged, norms = torch.empty_like(weight), b.new_empty(len(weight))
    library.call(name, weight, vectors, b, merged, norms, *weight.shape, len(a), float(scale))
    return merged, norms


def _for_stored(kernel: str, weight: Tensor) -> tuple[Kernels, str] | None:
    """The library, and the name of a kernel's variant for a stored matrix; None where it has none.

    Some processors have no instructions for float16.
    """
    library = kernels()
    if library is None or weight.dtype not in _STORED or weight.device.type != "cpu":
        return None
    if not weight.is_contiguous() or weight.shape[-1] % library.lanes:
        return None
    name = f"{kernel}_{_STORED[weight.dtype]}"
    return (library, name) if hasattr(library.functions, name) else None


def softmax_block(kernels: Kernels, scores: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """Take one block of columns into a running softmax; see elementwise.c.

    `scores` [n, columns] become exp(scores - peak); `peak` and `total` [n] are the largest score so
    far and the sum of exp(score - peak). Returns [n], the factor for sums over earlier blocks.
    """
    shrink = torch.empty_like(peak)
    kernels.call("tandem_softmax_block", scores, peak, total, shrink, *scores.shape)
    return shrink


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up, keeping the two and nothing else."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        kernels.call("tandem_swiglu_forward", gate, up, out, gate.numel())
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_out = grad_outputs[0].contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        numbers = gate.numel()
        ctx.kernels.call("tandem_swiglu_backward", d_out, gate, up, d_gate, d_up, numbers)
        return None, d_gate, d_up


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight (arXiv 1910.07467) with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, inverse = torch.empty_like(x), x.new_empty(rows)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, inverse)
        kernels.call("tandem_rms_norm_forward", x, weight, out, inverse, rows, width, epsilon)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        d_out, d_x = grad_outputs[0].contiguous(), torch.empty_like(x)
        sizes = inverse.shape[0], x.shape[-1]
        ctx.kernels.call("tandem_rms_norm_backward", d_out, x, weight, inverse, d_x, *sizes)
        return None, d_x, None, None
