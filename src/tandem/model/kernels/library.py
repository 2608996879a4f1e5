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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.artifact.cache import cache_folder

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


@dataclass
class _Switch:
    on: bool = True


_switch = _Switch()


def kernels() -> Kernels | None:
    """The library, or None where it is switched off or cannot be had; see `why_not`."""
    return _load()[0] if _switch.on else None


def why_not() -> str:
    """Why `kernels` is None here, in words; empty when it is not."""
    return _load()[1] if _switch.on else "switched off"


def switch(on: bool) -> None:
    """Let this process use the kernels, or torch's own operators instead."""
    _switch.on = on


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch's own operators inside the block."""
    before = _switch.on
    switch(False)
    try:
        yield
    finally:
        switch(before)


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
