"""Resolve the data sources that a stage names, and identify them by content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.data.formats.known_formats import format_called
from tandem.data.sources.rows import local_files, looks_like_path
from tandem.storage.hashing import hash_files

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource
    from tandem.recipe.training_settings import TrainingSettings


def resolve_sources(sources: Sequence[DataSource], run_folder: Path, seed: int) -> list[DataSource]:
    """Return sources for the readers; `demo:NAME` becomes a file in the run folder's `data`.

    `seed` decides the embedded data's splits. Raises UserError for a format that does not exist.
    """
    resolved = []
    for source in sources:
        path = source.path
        if path.startswith("demo:"):
            from tandem.demo.embedded import materialise

            path = str(materialise(path, run_folder / "data", seed))
        check_format(source)
        resolved.append(source.model_copy(update={"path": path}))
    return resolved


def check_format(source: DataSource) -> None:
    """Raise UserError for a source whose stated format does not exist."""
    if source.format is not None:
        format_called(source.format)


def held_out_sources(
    settings: TrainingSettings, sources: Sequence[DataSource], run_folder: Path, seed: int
) -> list[DataSource]:
    """Return the data sets that are held out as a whole; none where a fraction is held out."""
    return held_out_of(settings, sources, lambda named: resolve_sources(named, run_folder, seed))


def held_out_of(
    settings: TrainingSettings,
    sources: Sequence[DataSource],
    named: Callable[[Sequence[DataSource]], list[DataSource]],
) -> list[DataSource]:
    """Return `held_out_sources`; `named` resolves the sources that the recipe names."""
    validation = settings.validation
    if validation is None or validation.fraction is not None:
        return []
    if validation.split is not None:
        return [
            source.model_copy(update={"split": validation.split, "weight": 1.0})
            for source in sources
        ]
    return named(validation.data)


def data_identity(specs: Sequence[DataSource]) -> list[dict[str, Any]]:
    """Return what identifies the data: hashes of local files, name and revision on the Hub.

    Split, subset, and what the recipe says of formats and names are part of it.
    """
    identity: list[dict[str, Any]] = []
    for spec in specs:
        where: dict[str, Any] = {"split": spec.split, "subset": spec.subset, **spec.meaning}
        if spec.weight != 1.0:
            where["weight"] = spec.weight
        if looks_like_path(spec.path):
            identity.append({"files": hash_files(local_files(spec.path, spec.split)), **where})
        else:
            identity.append({"hub": spec.path, "revision": spec.revision, **where})
    return identity
