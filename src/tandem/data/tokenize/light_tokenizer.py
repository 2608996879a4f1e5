"""Tokenizers and chat templates without transformers, from the `tokenizers` library and jinja.

Only for tokenizer classes with which transformers takes tokenizer.json as it is. For every other
folder `read_light_tokenizer` returns None, and transformers reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

# Classes with which transformers gives the ids that tokenizer.json gives.
_AS_THE_FILE_SAYS = {
    "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast",
}  # fmt: skip
# Classes with which it does so for a byte-level tokenizer.json.
_IF_BYTE_LEVEL = {"LlamaTokenizer", "LlamaTokenizerFast"}
# Special tokens in the order in which transformers lists them and templates get them.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Files that add to tokenizer.json or take its place.
_OTHERS = ("added_tokens.json", "special_tokens_map.json", "additional_chat_templates")
_OF_A_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# The keys under which transformers lets templates read a message's reasoning.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class LightTokenizer:
    """The part of a tokenizer of transformers that encoding uses, under the same names.

    Args:
        backend: a `tokenizers.Tokenizer`.
        named: special tokens by name, such as `eos_token`.
        special: all special tokens, the named ones first.
        chat_template: its text, or texts by name.
    """

    is_fast = True
    split_special_tokens = False

    def __init__(
        self,
        backend: Any,
        named: Mapping[str, str],
        special: Sequence[str],
        chat_template: str | dict[str, str] | None,
    ) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(named)
        self.all_special_tokens = list(special)
        self.chat_template = chat_template

    @property
    def all_special_ids(self) -> list[int]:
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        token = self.special_tokens_map.get("eos_token")
        return None if token is None else self.convert_tokens_to_ids(token)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        tokens: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return tokens

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token; raise KeyError for one that is not in the vocabulary."""
        index = self.backend_tokenizer.token_to_id(token)
        if index is None:
            raise KeyError(token)
        return int(index)

    def convert_ids_to_tokens(self, index: int) -> str | None:
        token: str | None = self.backend_tokenizer.id_to_token(index)
        return token

    def add_tokens(self, tokens: Sequence[Any], *, special_tokens: bool) -> int:
        """Add tokens, an `AddedToken` each, and return how many are new."""
        add = "add_special_tokens" if special_tokens else "add_tokens"
        if special_tokens:
            self.all_special_tokens += [str(token.content) for token in tokens]
        return int(getattr(self.backend_tokenizer, add)(list(tokens)))

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        """Return the ids of texts with nothing added, and of a single text its tokens' spans."""
        if isinstance(texts, str):
            encoded = self.backend_tokenizer.encode(texts, add_special_tokens=False)
            return {"input_ids": encoded.ids, "offset_mapping": encoded.offsets}
        many = self.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return {"input_ids": [one.ids for one in many]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        return str(self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, chat_template: str, tools: Any, **values: Any
    ) -> str:
        """Render messages as transformers does."""
        values.pop("tokenize", None)
        messages = [_with_reasoning(message) for message in messages]
        template = compile_template(chat_template)
        return template(messages=messages, tools=tools, **self.special_tokens_map, **values)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_light_tokenizer(folder: Path) -> LightTokenizer | None:
    """Return the tokenizer of a folder, or None for one that transformers must read."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        content = json.loads(text)
        if any((folder / name).exists() for name in _OTHERS) or not _is_plain(config, content):
            return None
        return _build(folder, config, content, text)
    except Exception:  # transformers reports what is wrong with the files
        return None


def _is_plain(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Return whether transformers takes tokenizer.json as it is."""
    kind = config.get("tokenizer_class")
    known = kind in _AS_THE_FILE_SAYS or (
        kind in _IF_BYTE_LEVEL and '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
    )
    return known and not config.get("split_special_tokens") and "auto_map" not in config


def _build(
    folder: Path, config: dict[str, Any], content: dict[str, Any], text: str
) -> LightTokenizer | None:
    """Return the tokenizer of tokenizer.json's `text`, whose value is `content`."""
    from tokenizers import Tokenizer

    own = {token["id"]: token for token in content["added_tokens"]}
    stated = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for index, token in stated.items():
        if index not in own or any(own[index][key] != token[key] for key in _OF_A_TOKEN):
            return None
    named = {name: _text(config[name]) for name in _NAMED if config.get(name) is not None}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        return None
    special = list(dict.fromkeys([*named.values(), *map(_text, more)]))
    if not set(special) <= {token["content"] for token in own.values() if token["special"]}:
        return None
    backend = Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return LightTokenizer(backend, named, special, _template(folder, config))


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}
    return template if isinstance(template, str) else None


def compile_template(source: str, now: datetime | None = None) -> Callable[..., str]:
    """Return a function that renders messages, tools and special tokens as transformers does.

    `now`, if there is one, is the template's present time. Raises jinja's errors.
    """
    template = _environment().from_string(source)
    # Otherwise a chain of mappings, which every call would go through anew.
    template.globals = dict(template.globals)
    if now is not None:
        template.globals["strftime_now"] = now.strftime
    return lambda **values: str(template.render(documents=None, **values))


def parse_template(source: str) -> Any:
    """Return the syntax tree of a template; raise jinja's errors."""
    return _environment().parse(source)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Return transformers' sandbox for chat templates: its options, filters and globals."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Renders what `{% generation %}` marks; its masks are not needed here."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            self, args = args[0], args[1:]
            fields = dict(*args, **values)
            for name in fields:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(self, fields)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    class Dict:
        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def _refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                "Chat templates cannot store attributes that begin with an underscore on a "
                f"namespace, but got {name!r}. Please rename the attribute."
            )

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
