"""What encoded data depends on, as one key; where the data lies is no part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.artifact.hashing import hash_file, hash_json
from tandem.data.batch import Plan
from tandem.data.codec import CodecParts
from tandem.data.compressed import is_compressed, kind_of
from tandem.data.sources import SourceSpec, data_files, load_hub, looks_like_path

# Changes whenever the same records, tokenizer and limits would give other ids, masks or entries, or
# more is kept of them.
_ENCODER = 7


def encoding_key(sources: Sequence[SourceSpec], parts: CodecParts, plan: Plan) -> str | None:
    """The key of what a plan makes of some sources, or None when a source cannot be identified.

    Local files count by content and kind, data sets of the Hub by the files that `datasets` keeps
    of them, and both by what the recipe says of their formats and names.
    Raises `UserError` as reading the sources would.
    """
    contents = [_content(source) for source in sources]
    if any(content is None for content in contents):
        return None
    return hash_json(
        {
            "encoder": _ENCODER,
            "codec": parts.identity,
            "kind": plan.kind,
            "limits": [plan.limits.sequence, plan.limits.prompt, plan.limits.too_long],
            "loss_on": plan.loss_on,
            "on_bad_record": plan.on_bad_record,
            "sources": contents,
            "meanings": [source.meaning for source in sources],
        }
    )


def _content(source: SourceSpec) -> list[Any] | None:
    if looks_like_path(source.path):
        saved, files = data_files(source)
        try:
            return [saved, [[_kind(file), hash_file(file)] for file in files]]
        except OSError:  # reading says what is wrong with it
            return None
    table = load_hub(source)
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return None
    return [source.split, len(table), [hash_file(Path(file)) for file in files]]


def _kind(file: Path) -> str:
    """What a file's name says about how it is read."""
    return kind_of(file) + (file.suffix.lower() if is_compressed(file) else "")
