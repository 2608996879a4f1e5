"""Chat templates: which one is used, what it renders, and how it ends an answer.

Rendered text is tokenised without adding special tokens: BOS and end-of-turn tokens come from the
template, in training and in inference alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from tandem.data.records import Turn
from tandem.data.tokenize.light_tokenizer import parse_template
from tandem.errors import UserError, nearest

DEFAULT = "neural-chat"
# transformers' name of a model's template for records with tools.
TOOL_USE = "tool_use"
_MARK = "\ufeff"
# An answer that no template contains, to find a turn's text in what a template renders.
_ANSWER = "zqprobeanswerzq"
_PROBE = (Turn("user", "zqprobequestionzq"), Turn("assistant", _ANSWER))


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: its name, its jinja text, and notices for the user.

    `named` are all the templates of a model that has several, each with its name. `now` is the time
    for a template that writes the date, the same for all records of a run; None for all others.
    """

    name: str
    source: str
    notices: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()
    now: datetime | None = None

    def source_for(self, tools: str) -> str:
        """Return the jinja text for turns with these tools, as transformers chooses it."""
        return dict(self.named).get(TOOL_USE, self.source) if tools else self.source

    @property
    def for_tools(self) -> str | None:
        """The jinja text for turns with tools, if the model has a separate one."""
        return dict(self.named).get(TOOL_USE)

    @property
    def saved(self) -> str | dict[str, str]:
        """What a tokenizer saves: the text, or all the texts by name."""
        return dict(self.named) or self.source


@dataclass(frozen=True, slots=True)
class Ending:
    """How a template ends an answer: `closing`, whose last token is the end-of-turn token `token`
    (id `token_id`), and the `trailer` after it, which is not trained. Where no token ends it, all
    that is `missing`, the error for records with turns."""

    closing: str
    token: str
    token_id: int
    trailer: str
    missing: str = ""


def template_names() -> tuple[str, ...]:
    """Return the names of the templates in the package."""
    folder = files("tandem.data.tokenize") / "chat_templates"
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".jinja"))
    return tuple(sorted(name.removesuffix(".jinja") for name in names))


def resolve_template(tokenizer: Any, choice: str | None) -> ChatTemplate:
    """Choose the chat template and set it as the tokenizer's.

    `choice` is a template's name, a .jinja file, or None for the tokenizer's own (`neural-chat`
    when it has none, with a notice). Of several named templates of a tokenizer, None takes
    `default`, and `tool_use` for turns with tools. Raises `UserError` for an unknown name, a
    missing file, or a template that cannot render a plain exchange.
    """
    template = choose_template(tokenizer.chat_template, choice)
    tokenizer.chat_template = template.saved
    notices = (*template.notices, *_notices(tokenizer, template))
    texts = (template.source, *dict(template.named).values())
    dated = any("strftime_now" in text for text in texts)
    now = datetime.now().replace(microsecond=0) if dated else None
    return replace(template, notices=notices, now=now)


def render(
    tokenizer: Any, template: ChatTemplate, turns: Sequence[Turn], *, prompt: bool, tools: str = ""
) -> str:
    """Return the text of some turns; with `prompt` it ends where the assistant is to answer.

    `tools` is a JSON list of functions. Raises `UserError` with the template's own words when it
    refuses the turns.
    """
    try:
        text = tokenizer.apply_chat_template(
            [turn.message() for turn in turns],
            tools=json.loads(tools) if tools else None,
            chat_template=template.source_for(tools),
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except refusals() as error:
        raise cannot_render(template, turns, error) from error
    return str(text)


def refusals() -> tuple[type[Exception], ...]:
    """Return what rendering may raise: jinja's errors, the sandbox's, and those of expressions."""
    import jinja2

    return (
        jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError,
        TypeError, ValueError,
    )  # fmt: skip


def cannot_render(template: ChatTemplate, turns: Sequence[Turn], error: Exception) -> UserError:
    """Return the error that a template refuses some turns, or cannot be parsed."""
    import jinja2

    message = str(error).rstrip(".")
    if isinstance(error, jinja2.TemplateSyntaxError):
        message = str(error.message).rstrip(".")
        return UserError(
            f"chat template {template.name!r}, line {error.lineno}: {message}. Correct it, or "
            "choose another `chat_template`."
        )
    if "no loader for this environment" in message:
        return UserError(
            f"chat template {template.name!r} includes, imports or extends another file, and there "
            "is no loader for that: chat templates are one file, here as in transformers. Write "
            "the other one into it."
        )
    roles = " ".join(turn.role for turn in turns)
    return UserError(
        f"chat template {template.name!r} cannot render the turns ({roles}): {message}. "
        "Choose another `chat_template`, or change the data."
    )


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of rendered texts, nothing added, in one call."""
    if not texts:
        return []
    # Not verbose: truncation comes later, so a text beyond the model's context is no news.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def prompt_ids(
    tokenizer: Any, template: ChatTemplate, turns: Sequence[Turn], tools: str = ""
) -> list[int]:
    """Return the token ids that inference feeds for these turns, up to the assistant's answer."""
    return tokenize(tokenizer, [render(tokenizer, template, turns, prompt=True, tools=tools)])[0]


def stop_ids(tokenizer: Any, template: ChatTemplate) -> list[int]:
    """Return the token ids that end an answer: the template's end-of-turn token, and EOS."""
    ending = find_ending(tokenizer, template)
    ids = [] if ending is None else [ending.token_id]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def find_ending(tokenizer: Any, template: ChatTemplate, tools: str = "") -> Ending | None:
    """Return how the template of turns with `tools` ends an answer; None if no token ends it."""
    text = render(tokenizer, template, _PROBE, prompt=False, tools=tools)
    if _ANSWER not in text:
        raise UserError(f"chat template {template.name!r} leaves out the assistant's text.")
    closing = text[text.rindex(_ANSWER) + len(_ANSWER) :]
    tokens = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    tokens.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    # Some tokenizers have runs of blanks as added tokens; those end nothing.
    present = [token for token in tokens if token.strip() and token in closing]
    if not present:
        return None
    # Of tokens that begin at one place the tokenizer takes the longest.
    token = min(present, key=lambda one: (closing.index(one), -len(one), one))
    end = closing.index(token) + len(token)
    return Ending(closing[:end], token, tokens[token], closing[end:])


def ending_or_none(tokenizer: Any, template: ChatTemplate) -> Ending:
    """Return `find_ending`, or an `Ending` of which all is missing: records of tokens need none."""
    found = find_ending(tokenizer, template)
    return found or Ending("", "", -1, "", _endless(tokenizer, template))


def _endless(tokenizer: Any, template: ChatTemplate) -> str:
    text = (
        f"chat template {template.name!r} does not end an answer with a token of this tokenizer "
        "(EOS or another special token), so a model trained with it would never stop. Choose "
        f"another `chat_template` ({', '.join(template_names())}, or a .jinja file)"
    )
    missing = missing_tokens(tokenizer, template)
    if not missing:
        return f"{text}."
    listing = ", ".join(json.dumps(token) for token in missing)
    flags = " ".join(f"'{token}'" for token in missing)
    return (
        f"{text}, or add the tokens that it writes and train them: `added_tokens: [{listing}]` in "
        f"the recipe, `--added_tokens {flags}` for a stage."
    )


def missing_tokens(tokenizer: Any, template: ChatTemplate) -> list[str]:
    """Return what a template writes like special tokens (`<...>`) that the tokenizer lacks."""
    text = render(tokenizer, template, _PROBE, prompt=False)
    known = tokenizer.get_vocab()
    tokens = dict.fromkeys(re.findall(r"<\|[^<>|\s]+\|>|</?[A-Za-z_]+>", text))
    return [token for token in tokens if token not in known]


def choose_template(own: Any, choice: str | None) -> ChatTemplate:
    """Choose the template without rendering it; see `resolve_template`.

    `own` is the tokenizer's: a text, several by name, or None.
    """
    # Some editors put a byte order mark in front of UTF-8.
    named: dict[str, str] = {}
    if isinstance(own, dict):
        named = {name: str(text).removeprefix(_MARK) for name, text in own.items()}
    elif isinstance(own, str):
        own = own.removeprefix(_MARK)
    if choice is None and named:
        return _default_of(named)
    if choice is None:
        if own:
            return ChatTemplate("the model's own", own)
        notice = f"the model has no chat template: using {DEFAULT!r}"
        return ChatTemplate(DEFAULT, _packaged(DEFAULT), (notice,))
    if choice in template_names():
        return ChatTemplate(choice, _packaged(choice))
    if choice in named:
        others = ", ".join(sorted(named.keys() - {choice}))
        notice = (
            f"chat template {choice!r} of the model is used for every record, with tools or "
            f"without, and is saved as the only one (the model also has: {others})"
        )
        return ChatTemplate(choice, named[choice], (notice,) if others else ())
    try:
        path = Path(choice).expanduser()
    except RuntimeError:  # ~ of nobody
        path = Path(choice)
    if path.is_file():
        try:
            return ChatTemplate(choice, path.read_text(encoding="utf-8").removeprefix(_MARK))
        except UnicodeDecodeError as error:
            raise UserError(
                f"chat_template: {choice} cannot be read: it is not UTF-8 ({error}). "
                "Save it as UTF-8."
            ) from error
        except OSError as error:
            raise UserError(f"chat_template: {choice} cannot be read: {error}.") from error
    names = (*template_names(), *sorted(named))
    raise UserError(
        f"chat_template: {choice!r} is neither a file nor one of {', '.join(names)}."
        f"{nearest(choice, names)}"
    )


def _default_of(named: Mapping[str, str]) -> ChatTemplate:
    """Return a model's template called `default`, with the others that it has."""
    if "default" not in named:
        names = ", ".join(sorted(named))
        raise UserError(
            f"the model has several chat templates by name ({names}), and none is called default, "
            "which plain conversations take. Say which one to use with `chat_template`: a name of "
            f"these, a shipped one ({', '.join(template_names())}) or a .jinja file."
        )
    if len(named) == 1:
        return ChatTemplate("the model's own", named["default"])
    return ChatTemplate("the model's own", named["default"], named=tuple(sorted(named.items())))


def _packaged(name: str) -> str:
    folder = files("tandem.data.tokenize") / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def _random_part(template: ChatTemplate) -> str:
    """Return the name in a template of what gives another text each time, if there is one."""
    import jinja2

    for source in (template.source, *dict(template.named).values()):
        if "random" not in source and "lipsum" not in source:
            continue
        try:
            tree = parse_template(source)
        except jinja2.TemplateError:  # reported when it is rendered
            continue
        if any(one.name == "random" for one in tree.find_all(jinja2.nodes.Filter)):
            return "random"
        if any(one.name == "lipsum" for one in tree.find_all(jinja2.nodes.Name)):
            return "lipsum"
    return ""


def _notices(tokenizer: Any, template: ChatTemplate) -> list[str]:
    """Return what is unusual about a template, by rendering one exchange; refuse a doubled BOS."""
    ids = prompt_ids(tokenizer, template, _PROBE[:1])
    bos = tokenizer.bos_token_id
    notices = []
    if name := _random_part(template):
        raise UserError(
            f"chat template {template.name!r} renders the same turns differently each time: it "
            f"uses `{name}`. Take that out of it, or choose another `chat_template`."
        )
    if "strftime_now" in template.source:
        notices.append(
            f"chat template {template.name!r} may write the date: all records of a stage get that "
            "of its start, answers later that of their day"
        )
    if bos is not None and ids[:2] == [bos, bos]:
        raise UserError(
            f"chat template {template.name!r} begins with two BOS tokens ({tokenizer.bos_token}). "
            "Remove one from it."
        )
    if bos is not None and ids[:1] != [bos]:
        notices.append(
            f"chat template {template.name!r} renders no BOS token ({tokenizer.bos_token}): "
            "training and inference go without one"
        )
    if find_ending(tokenizer, template) is None:
        notices.append(_endless(tokenizer, template))
    return notices
