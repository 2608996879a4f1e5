"""A slice of the corruption table: each kind of file once, and each kind of damage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from . import corruption
from .corruption import DAMAGES, SOUND, Scene

# Every how many cases of a scene one is tried; each file of a name is taken once.
_SCENES = ("killed sft", "killed pairs", "killed evaluate", "run again", "merge", "report")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scene]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")  # what the scenes set is undone
        root = tmp_path_factory.mktemp("scenes")
        base = corruption.make_home(root / "base")
        found = [
            *corruption.interrupted_scenes(root, base, others=False),
            *corruption.finished_scenes(root, base, others=False),
        ]
        yield {scene.name: scene for scene in found}


def test_damage_is_named_and_refused_or_made_again(
    scenes: dict[str, Scene], tmp_path: Path
) -> None:
    damages = cycle(one for one in DAMAGES if one != "another run's")
    seen: set[str] = set()
    tried: set[str] = set()
    unsound = []
    for name in _SCENES:
        kinds = [file for file in scenes[name].files if _kind(name, file) not in seen]
        pairs = []
        for file in kinds:
            if _kind(name, file) not in seen:
                seen.add(_kind(name, file))
                pairs.append((file, next(damages)))
        for case in corruption.cases(scenes[name], tmp_path / "desk", pairs):
            tried.add(case.damage)
            if case.verdict not in SOUND:
                unsound.append((case.scene, case.file, case.damage, case.verdict, case.said[-600:]))
    assert unsound == []
    assert len(tried) > 15


def _kind(scene: str, file: str) -> str:
    """What a file is, whatever step or hash its name holds; by stage for the most important."""
    path = Path(file)
    name = "kept" if path.parent.name == "scores" else path.name
    name = path.suffix if "cache" in path.parts else name
    return f"{scene}: {name}" if name == "manifest.json" else name
