"""A base model before its weights are loaded: what a stage learns of it, and an adapter's base.

A stage looks its base up once. An adapter says which model it was trained on. The functions that
need torch or peft import them, so that mistakes are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from tandem.data.sources.rows import looks_like_path
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.vocabulary import AddedTokens, add_tokens, row_notices
from tandem.errors import UserError
from tandem.model.lora.adapter_config import CONFIG, is_adapter, read_config_values
from tandem.model.model_folder import (
    check_context,
    check_unquantized,
    described_rows,
    load_config,
    load_tokenizer,
    model_folder,
    model_without_weights,
    on_hub,
    require_model,
)
from tandem.model.weight_files import check_sums
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.hashing import hash_weights
from tandem.storage.manifest import read_manifest


@dataclass(frozen=True)
class BaseModelInfo:
    """A base model as a stage uses it, without its weights."""

    name: str  # as the run calls it
    folder: Path
    config: Any  # of transformers
    tokenizer: Any  # with the added tokens
    template: ChatTemplate
    added: AddedTokens  # tokens whose embeddings are trained

    @property
    def rows(self) -> int:
        """Rows of the embeddings, those of added tokens among them."""
        return described_rows(self.config, self.added)

    @property
    def chat(self) -> ChatTokenizer:
        """Tokenizer and template, ready to encode."""
        return ChatTokenizer.of(self.tokenizer, self.template, self.rows)

    def named(self, ids: Sequence[int]) -> str:
        """Tokens with their ids, for messages."""
        texts = self.tokenizer.convert_ids_to_tokens(list(ids))
        return ", ".join(f"{t!r} ({i})" for t, i in zip(texts, ids, strict=True)) or "none"

    def notices(self) -> tuple[str, ...]:
        """What a user should hear about template and tokenizer."""
        return (*self.template.notices, *row_notices(self.tokenizer, self.rows))

    def warnings(self) -> tuple[str, ...]:
        """A line on the template's tokens whose rows were never trained; reads these weights.

        It is for adapters: where all weights are trained, these rows are, too.
        """
        from tandem.model.untrained_rows import in_words, untrained_tokens

        words = in_words(
            untrained_tokens(
                self.folder, self.config, self.tokenizer, self.template, self.added.ids
            )
        )
        return () if words is None else (words,)


def load_base_info(
    run: RunSettings, folder: Path, max_length: int, *, weights: bool = True
) -> BaseModelInfo:
    """Look at a base model that a stage will train, with sequences of `max_length` tokens.

    Raises UserError for a folder that is no model (one without weights, if `weights`), one that is
    quantised already, a context that is too short, and an unusable tokenizer or template.
    """
    config = load_config(folder, weights=weights)
    check_unquantized(folder, config)
    check_context(config, max_length, folder)
    tokenizer = load_tokenizer(folder)
    added = add_tokens(tokenizer, run.added_tokens)
    template = resolve_template(tokenizer, run.chat_template)
    return BaseModelInfo(run.model, folder, config, tokenizer, template, added)


def check_base(folder: Path, sections: Mapping[str, TrainingSettings], *, weights: bool) -> None:
    """Raise UserError for a base model on which one of the training stages could not run.

    It may lack weights (if `weights`), context or layers for adapters, be quantised already, or
    have files into which no adapter could be merged. `sections` are the stages by name.
    """
    config = load_config(folder, weights=weights)
    check_unquantized(folder, config)
    for name, section in sections.items():
        check_context(config, section.max_length, folder, f"{name}.max_length")
    from tandem.model.added_tokens import embedding_names
    from tandem.model.lora.described import described_adapter
    from tandem.model.lora.targets import adapted_weights, check_targets, refused_modules

    model = model_without_weights(config)
    refused = refused_modules(model)
    changed: list[str] = []
    for name, section in sections.items():
        if section.full:
            continue
        targets = section.lora.target_modules
        if not isinstance(targets, str):
            check_targets(model, targets, refused, f"{name}.lora.target_modules")
        if weights:
            try:
                adapted = described_adapter(config, section.lora)
            except UserError as error:  # about a key of its section lora
                raise UserError(f"{name}.{error}") from None
            changed += adapted_weights(adapted)
    if weights:
        rows = [f"{name}.weight" for name in embedding_names(model)]
        check_sums(folder, model, dict.fromkeys([*changed, *rows]))


def check_model(name: str) -> None:
    """Raise UserError for a path at which there is neither a model nor an adapter."""
    if not on_hub(name):
        folder = model_folder(name)
        if not is_adapter(folder):
            require_model(folder)


def lasting_name(name: str, folder: Path) -> tuple[str, str | None]:
    """What an adapter says of its base, so that it is found from any working folder.

    Returns an absolute path or the Hub id of `name`, and the id's revision, None for a path.
    """
    if name.startswith("demo:"):
        return str(folder), None
    if looks_like_path(name):
        path = Path(name).expanduser()
        return str(path.resolve() if ".." in path.parts else path.absolute()), None
    # The Hub's cache has a folder for each commit.
    return name, folder.name if folder.parent.name == "snapshots" else None


def trained_weights(adapter: Path) -> str | None:
    """The hash of the weights that an adapter was trained on, None if no manifest says it."""
    manifest = read_manifest(adapter)
    model: Any = manifest["inputs"].get("model") if manifest else None
    found = model.get("weights") if isinstance(model, dict) else None
    return found if isinstance(found, str) else None


def find_base(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on; one on the Hub is fetched.

    A relative path is tried from the working folder, and from all folders above the adapter; where
    the manifest has the hash of the weights, a run that was moved as a whole is found, too.

    Raises UserError for a base that is missing, has other weights or is ambiguous, and for an
    adapter that is no plain LoRA.
    """
    from tandem.model.lora.adapter_folder import require_plain

    require_plain(adapter)
    named, revision = _named(adapter)
    trained_on = trained_weights(adapter)
    if named.startswith("demo:"):
        return _checked(adapter, named, model_folder(named), trained_on)
    places = list(_places(adapter, named, moved=trained_on is not None))
    if trained_on is not None:
        for place in places:
            if _weights(place) == trained_on:
                return place
    elif places:
        return _only(adapter, named, places)
    if places and looks_like_path(named):
        return _checked(adapter, named, places[0], trained_on)
    return _checked(adapter, named, _from_hub(adapter, named, revision), trained_on)


def check_weights(adapter: Path, base: str, weights: str, way_out: str) -> None:
    """Raise UserError if an adapter was trained on other weights than `base`'s, by their hash.

    `way_out` says what to do then.
    """
    trained_on = trained_weights(adapter)
    if trained_on is not None and trained_on != weights:
        raise UserError(
            f"{adapter} was trained on other weights than those of {base} (hash "
            f"{trained_on[:12]} there, {weights[:12]} here). {way_out}"
        )


def _named(adapter: Path) -> tuple[str, str | None]:
    values = read_config_values(adapter)
    named, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(named, str) or not named.strip():
        said = "is missing" if "base_model_name_or_path" not in values else f"is {named!r}"
        raise UserError(
            f"{adapter / CONFIG} does not say which model it was trained on: "
            f"base_model_name_or_path {said.replace('None', 'null')}. To use it, "
            f"{_merge_it(adapter)}"
        )
    return named, revision if isinstance(revision, str) else None


def _places(adapter: Path, named: str, *, moved: bool) -> Iterator[Path]:
    """Model folders of a name, the likeliest first, each once."""
    path, above = Path(named), list(adapter.resolve().parents)
    candidates = [_expanded(path)]
    if not path.is_absolute() and not named.startswith("~"):
        candidates += [folder / path for folder in above]
    if moved:
        # The last parts of the name, beside the adapter's own folders.
        parts = [part for part in PurePath(named).parts if part not in ("/", "..", "~")]
        counts = range(len(parts), 0, -1)
        candidates += [folder.joinpath(*parts[-n:]) for folder in above for n in counts]
    seen = set()
    for place in candidates:
        try:
            whole = (place / "config.json").is_file() and not (place / CONFIG).exists()
        except OSError:  # no permission, a name too long
            continue
        if whole and (real := place.resolve()) not in seen:
            seen.add(real)
            yield place


def _weights(place: Path) -> str | None:
    try:
        return hash_weights(place)
    except UserError:
        return None


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~ of nobody
        return path


def _only(adapter: Path, named: str, places: list[Path]) -> Path:
    """The one place, or any of several with the same weights."""
    require_model(places[0])
    if len(places) > 1 and len({_weights(place) for place in places}) > 1:
        listing = ", ".join(str(place.absolute()) for place in places)
        raise UserError(
            f"{adapter} is an adapter of {named}, and there are several models of that name with "
            f"other weights: {listing}. Its folder has no manifest that tells them apart. "
            f"To use it, {_merge_it(adapter)}"
        )
    return places[0]


def _from_hub(adapter: Path, named: str, revision: str | None) -> Path:
    if named.startswith(("/", "~", ".")) or looks_like_path(named):
        raise UserError(
            f"{adapter} is an adapter of {named}, and that folder is gone; beside the adapter "
            f"there is none of that name, either. Put it back, or {_merge_it(adapter)}"
        )
    try:
        return model_folder(named, revision)
    except UserError as error:
        raise UserError(
            f"{adapter} is an adapter of {named}. There is no such folder in {Path.cwd()} or "
            f"above the adapter; and as a Hub id: {error} To use it, {_merge_it(adapter)}"
        ) from None


def _checked(adapter: Path, named: str, base: Path, trained_on: str | None) -> Path:
    try:
        require_model(base)
    except UserError as error:
        raise UserError(f"{adapter} is an adapter of {named}: {error}") from None
    if trained_on is not None:
        check_weights(
            adapter, named, hash_weights(base), f"Put the base back, or {_merge_it(adapter)}"
        )
    return base


def _merge_it(adapter: Path) -> str:
    return (
        "merge it into its base, and name the merged folder: tandem merge --base-model-path "
        f"BASE --lora-model-path {adapter} --output-path OUT"
    )
