"""Memory of the machine: what this process took, what it may still take, giving it back."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# The files of both versions of cgroups: limits, what is used, and the name of file pages in
# memory.stat that are let go when memory is needed.
_Names = tuple[tuple[str, ...], str, str]
_V1: _Names = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2: _Names = (("memory.max", "memory.high"), "memory.current", "inactive_file")
# glibc's names of what mallopt sets, in <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGE = 4 << 20  # bytes from which a block of memory is mapped by itself
# What glibc comes to by itself in a program that frees large blocks, and its number of maps.
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65536}


def most_resident() -> int:
    """Return the peak of this process's resident memory in bytes."""
    # ru_maxrss would count the parent's memory when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_freed_memory() -> None:
    """From now on give large blocks of memory back to the system when they are freed.

    glibc keeps blocks of up to 32 MB for later. Where weights are gathered and let go layer by
    layer, what it keeps becomes as large as the model.
    """
    _set({_MMAP_THRESHOLD: _LARGE})


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, keep what is freed for the next block, whatever its size, up to 2 GB.

    The system would clear each page of a large block once more. For work that takes and frees many.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: (1 << 31) - 1})
    try:
        yield
    finally:
        _set(_USUAL)
        give_back_now()


def _set(options: Mapping[int, int]) -> None:
    with suppress(OSError, AttributeError):  # another C library
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def give_back_now() -> None:
    """Give what has been freed so far back to the system, where glibc kept it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that can be taken before the kernel ends the process.

    That is the smallest of the machine's available memory and what each cgroup leaves that the
    process is in. `root` is where /proc and /sys are.
    """
    return min([int(psutil.virtual_memory().available), *_left_by_cgroups(root)])


def _left_by_cgroups(root: Path) -> Iterator[int]:
    for folder, names in _cgroups(root):
        with suppress(OSError, ValueError):
            yield _left(folder, *names)


def _cgroups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of the process's cgroups and of those above them, with the names of files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another system, or no such file system
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            tops, names = [mounted, mounted / "unified"], _V2
        elif "memory" in controllers.split(","):
            tops, names = [mounted / "memory"], _V1
        else:
            continue
        for top in tops:
            # In a container the path may be the host's, and only the top one is there.
            own = top / path.strip("/")
            folders = [own, *(above for above in own.parents if above.is_relative_to(top))]
            yield from ((folder, names) for folder in folders)


def _left(folder: Path, limits: tuple[str, ...], used: str, pages: str) -> int:
    """What a cgroup leaves; raises OSError or ValueError where it has no limit."""
    limit = min(_limit(folder / name) for name in limits if (folder / name).exists())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, limit - int((folder / used).read_text()) + int(stat.get(pages, 0)))


def _limit(file: Path) -> int:
    text = file.read_text().strip()
    return 1 << 63 if text == "max" else int(text)
