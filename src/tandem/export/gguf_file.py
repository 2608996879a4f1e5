"""A GGUF file that is read: its settings, its vocabulary, and its tensors one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.export.formats import UNPACKED, unpacked
from tandem.export.vocabulary import FileVocabulary
from tandem.model.model_folder import first_line

_TOKENIZER = "tokenizer."
_GGML = "tokenizer.ggml."
_ALL = slice(None)


class GgufFile:
    """A GGUF file, mapped into memory; nothing of a tensor is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raise UserError for a file that is not there, or no whole GGUF file."""
        from gguf import GGUFReader

        self.path = path
        if not path.is_file():
            raise UserError(f"{path} is no file. Name a .gguf file.")
        try:
            reader = GGUFReader(path)
        except Exception as error:  # a cut file leads the reader anywhere
            raise UserError(
                f"{path} is no whole GGUF file ({first_line(error)}). Export or download it again."
            ) from None
        self._fields: dict[str, Any] = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.get("split.count", 1) > 1:
            raise UserError(
                f"{path} is one of several parts. Put them together with llama.cpp's "
                "llama-gguf-split --merge first."
            )

    @property
    def architecture(self) -> str:
        """What the file calls the model's family."""
        return str(self.get("general.architecture", ""))

    @property
    def formats(self) -> dict[str, str]:
        """The number format of each tensor, by gguf's names."""
        return {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """A value by its whole key."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def setting(self, key: str, default: Any = None) -> Any:
        """A value by the part of its key after the architecture."""
        return self.get(f"{self.architecture}.{key}", default)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor as torch has them."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str, rows: slice | Tensor = _ALL) -> Tensor:
        """A tensor, or some of its rows, as float32 in the file's own order."""
        from gguf import dequantize

        tensor = self._tensors[name]
        kind, chosen = tensor.tensor_type, rows if isinstance(rows, slice) else rows.numpy()
        stored = np.array(tensor.data[chosen])  # copied: the file is mapped read-only
        if kind.name in UNPACKED:
            return unpacked(torch.from_numpy(stored), kind.name)
        try:
            values = dequantize(stored, kind)
        except NotImplementedError as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}") from None
        return torch.from_numpy(values)

    def vocabulary(self) -> FileVocabulary:
        """The file's tokenizer; raises UserError for a file without one."""
        tokens = self.get(f"{_GGML}tokens")
        if not tokens:
            raise UserError(f"{self.path} has no vocabulary. Convert the model again, with one.")

        def of(key: str, default: Any = None) -> Any:
            return self.get(_GGML + key, default)

        model = str(of("model", ""))
        templates = {}
        if (main := self.get(f"{_TOKENIZER}chat_template")) is not None:
            templates["default"] = main
        for name in self.get(f"{_TOKENIZER}chat_templates", ()):
            templates[name] = self.get(f"{_TOKENIZER}chat_template.{name}")
        pieces = model == "llama"
        return FileVocabulary(
            model,
            tuple(tokens),
            tuple(of("token_type", [1] * len(tokens))),
            merges=tuple(of("merges", ())),
            scores=tuple(of("scores", [0.0] * len(tokens))) if pieces else (),
            pre=str(of("pre", "")),
            # What llama.cpp assumes where the file says nothing.
            add_bos=bool(of("add_bos_token", pieces or of("pre") in ("llama-bpe", "tekken"))),
            add_space_prefix=bool(of("add_space_prefix", pieces)),
            bos=of("bos_token_id", 1 if pieces else None),
            eos=of("eos_token_id", 2 if pieces else None),
            eot=of("eot_token_id"),
            unknown=of("unknown_token_id", 0 if pieces else None),
            padding=of("padding_token_id"),
            templates=templates,
            name=str(self.get("general.name", "")),
        )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)
