"""The Dockerfile, as far as it can be checked without building it: what it names is there, and its
pip commands are run by a real pip, offline, in an environment that looks like the image's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
TARGETS = ("cpu", "cuda", "hpu")


@dataclass(frozen=True)
class Stage:
    """A build stage: its base, and its instructions as (name, value) in order."""

    name: str
    base: str
    steps: tuple[tuple[str, str], ...]

    def values(self, *instructions: str) -> list[str]:
        return [value for name, value in self.steps if name in instructions]


def _stages() -> dict[str, Stage]:
    parser = DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes()))
    bases = iter(parser.parent_images)
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    for step in parser.structure:
        name, value = step["instruction"], step["value"]
        if name == "FROM":
            found.append((value.split()[-1], next(bases), []))
        elif found and name != "COMMENT":
            found[-1][2].append((name, value))
    return {name: Stage(name, base, tuple(steps)) for name, base, steps in found}


STAGES = _stages()


def _lineage(target: str) -> list[Stage]:
    """The target's stage behind those that it is built on."""
    stage = STAGES[target]
    return [*(_lineage(stage.base) if stage.base in STAGES else []), stage]


def _commands(run: str) -> list[list[str]]:
    """The commands of a RUN, without its mounts and redirections; pipes part commands as well."""
    text = re.sub(r"^(--mount=\S+\s+)+", "", run)
    found: list[list[str]] = [[]]
    for word in shlex.split(text, posix=True):
        if word in ("&&", "|", ";"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def _installs(stage: Stage) -> list[list[str]]:
    """The arguments of each `pip install` of a stage."""
    return [
        words[words.index("install") + 1 :]
        for run in stage.values("RUN")
        for words in _commands(run)
        if "pip" in words and "install" in words
    ]


def _mounts(run: str) -> list[dict[str, str]]:
    return [
        dict(field.split("=", 1) for field in mount.split(","))
        for mount in re.findall(r"--mount=(\S+)", run)
    ]


def _sent(path: str) -> bool:
    """Whether .dockerignore lets a path through to the build; the last fit decides."""
    sent = True
    parts = Path(path).parts
    prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        pattern = pattern.removeprefix("**/")
        names = [*prefixes, *parts] if "**/" in line else prefixes
        if any(fnmatch(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_the_targets_are_there_and_the_last_one_runs_everywhere() -> None:
    assert set(TARGETS) <= set(STAGES)
    assert list(STAGES)[-1] == "cpu"


def test_bases_are_public_and_of_a_stated_release() -> None:
    bases = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert len(bases) == 2
    for base in bases:
        gaudi = re.fullmatch(r"vault\.habana\.ai/gaudi-docker/[\d.]+/\S+-[\d.]+:latest", base)
        assert gaudi or re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base), base


def test_what_is_copied_and_mounted_exists() -> None:
    for stage in STAGES.values():
        copied = [
            source
            for value in stage.values("COPY", "ADD")
            for source in [word for word in value.split() if not word.startswith("--")][:-1]
        ]
        assert not any("--from" in value for value in stage.values("COPY", "ADD"))
        for run in stage.values("RUN"):
            for mount in _mounts(run):
                if "from" not in mount:
                    copied.append(mount["source"])
                    continue
                made = "\n".join(STAGES[mount["from"]].values("RUN"))
                assert f"{mount['source']}/" in made or f" {mount['source']}" in made
        for source in copied:
            assert (ROOT / source).exists(), source
            assert _sent(source), f".dockerignore keeps {source} out"


def test_nothing_else_is_sent_to_the_build() -> None:
    for path in (".git", ".venv", "tests", "docs", "benchmarks", "runs/demo", "notebooks/runs"):
        assert not _sent(path), path
    assert not _sent("src/tandem/__pycache__/errors.pyc")
    assert _sent("src/tandem/errors.py")


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_pip_is_given_exist(target: str) -> None:
    made = {"constraints.txt", "/needed/requirements.txt"}
    for stage in [*_lineage(target), STAGES["wheel"]]:
        for words in _installs(stage):
            assert "--no-cache-dir" in words
            for flag, name in pairwise(words):
                if flag in ("--requirement", "--constraint") and name not in made:
                    assert name.startswith("/requirements/")
                    assert (ROOT / name.removeprefix("/")).is_file(), name
    pinned = {"--constraint", "--no-deps"}
    assert all(pinned & set(words) for words in _installs(STAGES[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_a_command_of_the_package(target: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    *_, entry = [value for stage in _lineage(target) for value in stage.values("ENTRYPOINT")]
    (command,) = re.findall(r'"([^"]+)"', entry)
    assert command in scripts


def test_users_are_not_root_but_in_habanas_image() -> None:
    for target in ("cpu", "cuda"):
        assert STAGES[target].steps[-1] == ("USER", "1000")
        assert any("--uid 1000" in run for s in _lineage(target) for run in s.values("RUN"))
    assert STAGES["hpu"].values("USER") == []
    assert "\n# Root, as the base is" in DOCKERFILE.read_text()


def test_caches_are_a_volume_and_open_to_any_user() -> None:
    for target in TARGETS:
        lines = "\n".join(v for s in _lineage(target) for v in s.values("ENV"))
        assert "XDG_CACHE_HOME=/cache" in lines
        assert "HF_HOME=/cache/huggingface" in lines
        assert [v for s in _lineage(target) for v in s.values("VOLUME")] == ['["/cache"]']
    made = " ".join(STAGES["runtime"].values("RUN"))
    assert "--mode=1777 /cache /work" in made


def test_the_hpu_image_asks_for_no_torch() -> None:
    for words in _installs(STAGES["hpu"]):
        assert not [word for word in words if re.match(r"torch\b", word)]
        assert not {"--upgrade", "-U", "--force-reinstall", "--index-url"} & set(words)
        assert "--no-deps" in words or words[words.index("--constraint") + 1] == "constraints.txt"
    assert "diff kept.txt" in STAGES["hpu"].values("RUN")[-1]


def test_the_page_builds_every_target_and_runs_gaudi_as_the_tutorial_does() -> None:
    page = (ROOT / "docs" / "guide" / "containers.md").read_text().replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in page.splitlines()]
    for target in TARGETS:
        assert f"docker build --target {target} --tag tandem:{target} ." in lines
    gaudi = (
        "docker run -it --runtime=habana -e HABANA_VISIBLE_DEVICES=all "
        "-e OMPI_MCA_btl_vader_single_copy_mechanism=none "
        "--cap-add=sys_nice --net=host --ipc=host"
    )
    assert f"{gaudi} --entrypoint bash tandem:hpu" in lines
    release = re.search(r"gaudi-docker/([\d.]+)/", STAGES["hpu"].base)
    assert release is not None
    assert f"the default is release {release.group(1)}" in page


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An environment with the locked packages and, in name, those of notebook.txt."""
    environment = tmp_path / "image"
    _bash(f"{shlex.quote(sys.executable)} -m venv --without-pip {environment}", tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = environment / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    for line in (ROOT / "requirements" / "notebook.txt").read_text().splitlines():
        if not line.startswith("#"):
            _add(packages, *line.split("=="))
    return packages


def _add(packages: Path, name: str, version: str, *needs: str) -> None:
    """A package that is installed as far as pip can see."""
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / "RECORD").touch()


def _bash(command: str, folder: Path, packages: Path | None = None) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if packages is not None:
        found = f"{packages.parents[2] / 'bin'}{os.pathsep}{variables['PATH']}"
        # No index: pip has to find everything installed, or fails.
        variables |= {"PATH": found, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # What it would say at the end of packages that it was not asked for is not looked at. As a
        # variable, what begins with NO is the value of what the flag turns off.
        variables["PIP_NO_WARN_CONFLICTS"] = "0"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )


def _run(run: str, folder: Path, packages: Path) -> subprocess.CompletedProcess:
    """Execute a RUN as it stands, its mounts' paths replaced by where those files are here."""
    command = re.sub(r"^(--mount=\S+\s+)+", "", run)
    command = re.sub(r"(?<=\s)/needed", str(folder / "needed"), command)
    command = re.sub(r"(?<=\s)/requirements(?=/)", str(ROOT / "requirements"), command)
    return _bash(command, folder, packages)


def _dependencies_are_named(folder: Path, packages: Path) -> None:
    """The step of the wheel's stage that writes /needed, in a copy of what it reads."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (step,) = (run for run in STAGES["wheel"].values("RUN") if "/needed" in run)
    done = _run(step, folder, packages)
    assert done.returncode == 0, done.stderr
    needed = (folder / "needed" / "requirements.txt").read_text().splitlines()
    assert {"torch>=2.9", "ipykernel>=7.0"} <= set(needed)


def _installed(packages: Path) -> set[str]:
    return {path.name for path in packages.iterdir()}


def test_the_locked_versions_are_all_that_an_image_asks_for(image: Path, tmp_path: Path) -> None:
    """Had pip to install anything, or did two files disagree, it would fail."""
    _dependencies_are_named(tmp_path, image)
    before = _installed(image)
    cpu, cuda = (
        [run for run in STAGES[target].values("RUN") if "/wheels" not in run]
        for target in ("cpu", "cuda")
    )
    # Both install the dependencies by the same command, which need not run twice.
    assert set(cpu) & set(cuda)
    for run in dict.fromkeys([*cpu, *cuda]):
        done = _run(run, tmp_path, image)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "already satisfied" in done.stdout
    assert _installed(image) == before


@pytest.fixture
def gaudi(image: Path) -> Path:
    """The same with the packages of Habana's image, in name."""
    _add(
        image, "torch", "2.11.0a0+git009b5f6", "filelock", "typing-extensions>=4.10.0",
        "setuptools<82", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5",
    )  # fmt: skip
    _add(image, "torchvision", "0.26.0+cpu", "torch", "numpy")
    _add(image, "setuptools", "80.9.0")
    _add(image, "habana-torch-plugin", "1.24.1.17")
    return image


def test_the_hpu_image_keeps_its_torch_or_is_not_built(gaudi: Path, tmp_path: Path) -> None:
    _dependencies_are_named(tmp_path, gaudi)
    constrain, install, _, check = STAGES["hpu"].values("RUN")
    for run in (constrain, install, check):
        done = _run(run, tmp_path, gaudi)
        assert done.returncode == 0, done.stdout + done.stderr
    _pip_refuses_what_would_replace_torch(install, tmp_path, gaudi)
    kept = (tmp_path / "kept.txt").read_text().splitlines()
    assert kept == [
        "habana-torch-plugin==1.24.1.17", "torch==2.11.0a0+git009b5f6", "torchvision==0.26.0+cpu"
    ]  # fmt: skip
    constraints = (tmp_path / "constraints.txt").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch==")] == kept[1:2]

    names = ("torch", "habana-torch-plugin")
    for name in names:
        (folder,) = gaudi.glob(f"{name.replace('-', '_')}-*.dist-info")
        folder.rename(tmp_path / folder.name)
        _add(gaudi, name, "2.13.0")
    done = _run(check, tmp_path, gaudi)
    assert done.returncode != 0
    assert all(f"> {name}==2.13.0" in done.stdout for name in names)


def _pip_refuses_what_would_replace_torch(install: str, folder: Path, packages: Path) -> None:
    needed = folder / "needed" / "requirements.txt"
    needed.write_text(needed.read_text().replace("torch>=2.9", "torch>=2.12"))
    done = _run(install, folder, packages)
    assert done.returncode != 0
    assert "torch" in done.stderr
