"""Data sources as stages name them: resolved, and identified by content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.data.formats.known_formats import format_called
from tandem.data.sources.rows import SourceSpec, local_files, looks_like_path
from tandem.recipe.section import DataSource
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.hashing import hash_files


def source_specs(sources: Sequence[DataSource], run_folder: Path, seed: int) -> list[SourceSpec]:
    """A recipe's sources for the readers; `demo:NAME` becomes a generated file.

    Args:
        sources: as the recipe says them.
        run_folder: the embedded demo's data is written into its `data` folder.
        seed: of the embedded data's splits.
    """
    specs = []
    for source in sources:
        path = source.path
        if path.startswith("demo:"):
            from tandem.demo.embedded import materialise

            path = str(materialise(path, run_folder / "data", seed))
        specs.append(source_spec(source, path))
    return specs


def source_spec(source: DataSource, path: str) -> SourceSpec:
    """One source for the readers, at `path`; raises UserError for a format that is none."""
    if source.format is not None:
        format_called(source.format)
    return SourceSpec(
        path,
        source.split,
        source.subset,
        source.revision,
        source.format,
        tuple(sorted(source.fields.items())),
        tuple(sorted(source.roles.items())),
        source.completions,
        source.weight,
    )


def held_out_sources(
    settings: TrainingSettings, sources: Sequence[SourceSpec], run_folder: Path, seed: int
) -> list[SourceSpec]:
    """The data sets that are held out as a whole; none where a fraction is."""
    return held_out_of(settings, sources, lambda named: source_specs(named, run_folder, seed))


def held_out_of(
    settings: TrainingSettings,
    sources: Sequence[SourceSpec],
    named: Callable[[Sequence[DataSource]], list[SourceSpec]],
) -> list[SourceSpec]:
    """See `held_out_sources`; `named` makes sources of those that the recipe names."""
    validation = settings.validation
    if validation is None or validation.fraction is not None:
        return []
    if validation.split is not None:
        return [replace(source, split=validation.split, weight=1.0) for source in sources]
    return named(validation.data)


def data_identity(specs: Sequence[SourceSpec]) -> list[dict[str, Any]]:
    """What the data is: hashes of local files; name, subset, split and revision on the Hub.

    What the recipe says of formats and names is part of it, where it says something.
    """
    found: list[dict[str, Any]] = []
    for spec in specs:
        where: dict[str, Any] = {"split": spec.split, "subset": spec.subset, **spec.meaning}
        if spec.weight != 1.0:
            where["weight"] = spec.weight
        if looks_like_path(spec.path):
            found.append({"files": hash_files(local_files(spec.path, spec.split)), **where})
        else:
            found.append({"hub": spec.path, "revision": spec.revision, **where})
    return found
