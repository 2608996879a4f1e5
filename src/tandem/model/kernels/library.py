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
from dataclasses import dataclass
from pathlib import Path

from tandem.artifact.cache import cache_folder
from tandem.errors import UserError

# off: torch's own operators, for comparisons and where a compiler is broken.
_VARIABLE = "TANDEM_KERNELS"

_SOURCES = ("vectors.h", "attention.c", "elementwise.c")
# No -ffast-math: infinities and NaN must stay what they are.
_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120


@dataclass(frozen=True)
class Kernels:
    """The loaded library; `lanes` is the number of floats in a vector of this processor."""

    functions: ctypes.CDLL
    lanes: int


def kernels() -> Kernels | None:
    """The library, or None where it cannot be had or `TANDEM_KERNELS=off`; see `why_not`."""
    return None if _switched_off() else _load()[0]


def why_not() -> str:
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
        functions = ctypes.CDLL(str(_built(compiler)))
        functions.tandem_lanes.restype = ctypes.c_int64
        return Kernels(functions, int(functions.tandem_lanes())), ""
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return None, f"{compiler} failed: {lines[0] if lines else error}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return None, f"{compiler}: {error}"


def _built(compiler: str) -> Path:
    """The library's file, compiled unless the cache has it for these sources and processor."""
    here = Path(__file__).parent
    # ARM's compilers call it -mcpu.
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler.split(), native, *_FLAGS]
    version = _run([*compiler.split(), "--version"])
    digest = hashlib.sha256("\0".join([*command, version, _processor()]).encode())
    for name in _SOURCES:
        digest.update((here / name).read_bytes())
    path = cache_folder() / "kernels" / f"{digest.hexdigest()[:32]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, for several processes may build at once.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            made = Path(folder) / path.name
            code = [str(here / name) for name in _SOURCES if name.endswith(".c")]
            _run([*command, *code, "-o", str(made), "-lm"])
            made.replace(path)
    return path


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
