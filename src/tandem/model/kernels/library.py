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
        functions = _loaded(compiler)
        functions.tandem_lanes.restype = ctypes.c_int64
        return Kernels(functions, int(functions.tandem_lanes())), ""
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return None, f"{compiler} failed: {lines[0] if lines else error}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return None, f"{compiler}: {error}"


def _loaded(compiler: str) -> ctypes.CDLL:
    """The library of the cache; where that cannot be kept or loaded, one made for this process.

    A file under the right name may be damaged, or on a disk from which nothing may be executed.
    """
    # A linker that finds no room fails as a compiler does.
    with suppress(OSError, AttributeError, subprocess.CalledProcessError):
        kept = ctypes.CDLL(str(_built(compiler, cache_folder() / "kernels")))
        _ = kept.tandem_lanes
        return kept
    with tempfile.TemporaryDirectory(prefix="tandem-kernels-") as folder:
        return ctypes.CDLL(str(_built(compiler, Path(folder))))


def _built(compiler: str, folder: Path) -> Path:
    """The library's file in a folder, compiled unless it is there for these sources and processor.

    Raises OSError where it cannot be written, CalledProcessError where it cannot be compiled.
    """
    here = Path(__file__).parent
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
        made = Path(aside) / "made.so"
        code = [str(here / source) for source in _SOURCES if source.endswith(".c")]
        _run([*command, *code, "-o", str(made), "-lm"])
        return made.replace(folder / _named(name, made))


def _named(name: str, library: Path) -> str:
    """The file name of a library: what it was made of, and a checksum of what it is."""
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
