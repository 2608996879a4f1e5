"""What a process may still take: the machine's memory, and what its cgroups leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tandem.runtime import host_memory
from tandem.runtime.host_memory import (
    available_memory,
    freed_memory_kept,
    give_back_freed_memory,
)

GB = 10**9


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GB))


def _write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 20 * GB
    assert 0 < available_memory() <= 20 * GB


def test_the_second_version_counts_every_folder_above_and_files_pages_are_free(
    tmp_path: Path,
) -> None:
    group = "sys/fs/cgroup/a/b"
    _write(tmp_path, {
        "proc/self/cgroup": "0::/a/b",
        f"{group}/memory.max": 9 * GB, f"{group}/memory.high": "max",
        f"{group}/memory.current": 5 * GB, f"{group}/memory.stat": f"anon 7\ninactive_file {GB}",
        "sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": 6 * GB,
        "sys/fs/cgroup/a/memory.stat": "inactive_file 0",
    })  # fmt: skip
    assert available_memory(tmp_path) == 5 * GB
    _write(tmp_path, {f"{group}/memory.high": 7 * GB})
    assert available_memory(tmp_path) == 3 * GB
    _write(tmp_path, {"sys/fs/cgroup/a/memory.max": 8 * GB})
    assert available_memory(tmp_path) == 2 * GB
    _write(tmp_path, {"sys/fs/cgroup/a/memory.max": 5 * GB})
    assert available_memory(tmp_path) == 0


def test_in_a_container_the_path_may_be_the_hosts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    _write(tmp_path, {
        "proc/self/cgroup": "0::/system.slice/docker-1234.scope",
        f"{top}/memory.max": 4 * GB, f"{top}/memory.current": GB,
        f"{top}/memory.stat": "inactive_file 0",
    })  # fmt: skip
    assert available_memory(tmp_path) == 3 * GB


def test_the_first_version(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/1"
    _write(tmp_path, {
        "proc/self/cgroup": "12:cpu,cpuacct:/docker/1\n5:memory:/docker/1\n0::/docker/1",
        f"{group}/memory.limit_in_bytes": 6 * GB, f"{group}/memory.usage_in_bytes": 4 * GB,
        f"{group}/memory.stat": f"cache 5\ntotal_inactive_file {GB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 11 * GB,
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0",
    })  # fmt: skip
    assert available_memory(tmp_path) == 3 * GB


def test_files_that_say_nonsense_are_passed_over(tmp_path: Path) -> None:
    _write(tmp_path, {
        "proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": "much",
        "sys/fs/cgroup/a/memory.current": 1, "sys/fs/cgroup/a/memory.stat": "",
    })  # fmt: skip
    assert available_memory(tmp_path) == 20 * GB


def test_what_is_usual_comes_back_after_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an engine that shards can give memory back after a merge in the same process."""
    seen: list[dict[int, int]] = []
    monkeypatch.setattr(host_memory, "_set", lambda options: seen.append(dict(options)))
    with pytest.raises(ValueError, match="a fault"), freed_memory_kept():
        raise ValueError("a fault")
    inside, after = seen
    assert inside.keys() < after.keys()
    give_back_freed_memory()
    assert seen[2].keys() < after.keys()
