"""A model that is evaluated: a folder, or an adapter with its base, and what tells it apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.vocabulary import AddedTokens, add_tokens
from tandem.model.base_model import find_base
from tandem.model.lora.adapter_config import is_adapter
from tandem.model.model_folder import (
    described_rows,
    load_config,
    load_tokenizer,
    model_folder,
    require_model,
)
from tandem.storage.hashing import hash_file, hash_json, hash_weights

if TYPE_CHECKING:
    from tandem.runtime.device import Device


@dataclass(frozen=True)
class EvalModel:
    """A model and what it is called in results."""

    label: str  # in tables
    folder: Path  # the model, or the adapter's base
    adapter: Path | None  # the adapter's folder, None for a whole model
    # the recipe's, for a base without a template: their embeddings are the mean of all others, as
    # when training begins
    added_tokens: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether its adapter was trained on a quantised base."""
        from tandem.model.quantize import read_record

        return self.adapter is not None and read_record(self.adapter) is not None

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return load_config(self.folder)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of its weights."""
        hashes = {"weights": hash_weights(self.folder)}
        if self.adapter is not None:
            hashes["adapter"] = hash_weights(self.adapter)
            hashes["adapter_config"] = hash_file(self.adapter / "adapter_config.json")
        return hashes

    def tokenizer(self, chat_template: str | None) -> tuple[Any, ChatTemplate]:
        """The tokenizer and the template: its own, an adapter's first, else `chat_template`."""
        if self.adapter is None:
            tokenizer = load_tokenizer(self.folder)
        else:
            from tandem.model.companion_files import load_combined_tokenizer

            tokenizer = load_combined_tokenizer(self.folder, self.adapter)
        if getattr(tokenizer, "chat_template", None):
            return tokenizer, resolve_template(tokenizer, None)
        add_tokens(tokenizer, self.added_tokens)
        return tokenizer, resolve_template(tokenizer, chat_template)

    @property
    def grows(self) -> bool:
        """Whether it lacks tokens that it will be asked with."""
        added = self._added()
        if not added:
            return False
        config = self.config
        return bool(added.new) or described_rows(config, added) > described_rows(config)

    def _added(self) -> AddedTokens:
        """The tokens that it is asked with, where it has no template of its own."""
        if self.adapter is None and self.added_tokens:
            tokenizer = load_tokenizer(self.folder)
            if not tokenizer.chat_template:
                return add_tokens(tokenizer, self.added_tokens)
        return AddedTokens()

    def stays_stored(self, device: Device) -> bool:
        """Whether its weights stay narrower in memory than they are computed with."""
        from tandem.model.load_model import stored_dtype

        place = device.weights, device.torch_device
        return not self.quantized and stored_dtype(self.folder, self.config, *place) is not None

    def load_base(self, device: Device, log: Callable[[str], None] = lambda _: None) -> Any:
        """The model, or an adapter's base as the adapter saw it."""
        from tandem.model.load_model import load_base, load_model
        from tandem.model.prepare_model import WITH_ADDED_TOKENS, Preparation, prepare_model

        place: dict[str, Any] = {"dtype": device.weights, "device": device.torch_device, "log": log}
        if self.adapter is None:
            model = load_model(self.folder, **place)
            return prepare_model(model, WITH_ADDED_TOKENS, Preparation(added=self._added()))
        return load_base(self.folder, self.adapter, **place)

    def with_adapter(self, base: Any) -> Any:
        """What answers: the loaded base with its adapter, if there is one."""
        from tandem.model.load_model import load_adapter

        return base if self.adapter is None else load_adapter(base, self.adapter)


def find_eval_model(label: str, path: str, added_tokens: tuple[str, ...] = ()) -> EvalModel:
    """Look a model up: a model folder, an adapter's folder, or a Hub id, which is fetched.

    Raises UserError for other folders, and for an adapter without the base that it was trained on.
    """
    folder = model_folder(path)
    if not is_adapter(folder):
        require_model(folder)
        return EvalModel(label, folder, None, added_tokens)
    return EvalModel(label, find_base(folder), folder)


def tokenizer_identity(tokenizer: Any, template: ChatTemplate | None) -> str:
    """Hash of how texts become tokens, the chat template included where it has a part."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(tokenizer.get_vocab())
    named = {"named": template.named} if template and template.named else {}
    source = template.source if template else None
    return hash_json({"tokenizer": text, "template": source, **named})
