"""A chat in the terminal with one model, or with several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.chat.stream_answer import StreamedAnswer, model_stop_ids, stream_answer
from tandem.data.records import Turn
from tandem.data.tokenize import chat_template
from tandem.data.tokenize.chat_template import ChatTemplate, prompt_ids
from tandem.data.tokenize.template_omissions import Omissions, omissions_of
from tandem.data.tokenize.vocabulary import require_rows
from tandem.errors import UserError
from tandem.model.added_tokens import rows_of
from tandem.model.generate import Sampling
from tandem.model.model_folder import context_length
from tandem.storage.manifest import check_made
from tandem.storage.run_folder import labels_of, model_in_run

HELP = """\
/help          these commands
/reset         forget the conversation
/system TEXT   set the system prompt (alone: show it)
/quit          leave (so does Ctrl-D); Ctrl-C interrupts an answer
//TEXT         say TEXT with one leading slash"""
_PROMPT = "> "
_COLUMN_WIDTH = 38  # narrower columns are harder to read than one answer after the other


@dataclass
class _Speaker:
    """A model in the conversation, with its history."""

    label: str
    model: Any
    tokenizer: Any
    template: ChatTemplate
    stop: list[int]
    context: int | None
    rows: int
    omissions: Omissions
    turns: list[Turn] = field(default_factory=list)


@dataclass
class _Chat:
    """The state of a chat: the speakers with their histories, the system prompt, the options."""

    speakers: list[_Speaker]
    system: str | None
    sampling: Sampling
    seed: int | None
    console: Console
    asked: int = 0


@dataclass(frozen=True)
class ChatOptions:
    """Options of a chat."""

    sampling: Sampling  # how answers are drawn; its seed is not read
    system: str | None = None  # the system prompt
    # a template's name or file; None: the one saved with each model
    chat_template: str | None = None
    seed: int | None = None  # of the first answer, plus one for each later answer; None: random
    device: str = "cpu"  # where the models answer


def run_chat(
    models: Sequence[str],
    options: ChatOptions,
    console: Console,
    read: Callable[[str], str] = input,
) -> None:
    """Read messages with `read`, stream each model's answer, until /quit or the end of input.

    `models` are model or adapter folders or Hub ids; each has its own history. Raises UserError for
    a model that cannot be loaded, has no chat template, or one that ignores the system prompt.
    """
    _check(models, options.sampling)
    try:
        system = None if options.system is None else _whole_text(options.system)
    except UnicodeError as error:
        raise UserError(f"--system: {_not_text(error)}.") from error
    labels = labels_of(models)
    speakers = []
    for path, label in zip(models, labels, strict=True):
        folder = model_in_run(path)
        if folder != path:
            console.print(Text(f"{path} is a run; talking to its {folder}", "dim"))
        if Path(folder).is_dir():

            def warn(text: str) -> None:
                console.print(Text(text, "yellow"))

            # Without hashing large weights, because no result depends on a chat.
            check_made(Path(folder), warn, weights=False)
        with console.status(Text(f"loading {label}")):
            speakers.append(_load(folder, label, options, console))
        for notice in speakers[-1].template.notices:
            console.print(Text(f"{label}: {notice}", "dim"))
    if system and (refusal := _system_refused(speakers, system)):
        raise UserError(
            f"--system: {refusal} Leave it out, or choose the --chat_template that the model was "
            "tuned with."
        )
    chat = _Chat(speakers, system, options.sampling, options.seed, console)
    console.print(Text(f"Chat with {', '.join(labels)}. /help lists the commands.", "dim"))
    if read is input:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` line editing and a history)
    _loop(chat, read)


def _loop(chat: _Chat, read: Callable[[str], str]) -> None:
    while True:
        try:
            line = _whole_text(read(_PROMPT)).strip()
        except EOFError:
            chat.console.print()
            return
        except UnicodeError as error:
            chat.console.print(Text(f"That line was not sent: {_not_text(error)}", "yellow"))
            continue
        except OSError as error:  # a terminal that is gone
            raise UserError(f"the input cannot be read: {error.strerror}") from error
        except KeyboardInterrupt:
            chat.console.print(Text("\n/quit or Ctrl-D leaves", "dim"))
            continue
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            if not _command(chat, line):
                return
            continue
        try:
            _ask(chat, line.removeprefix("/") if line.startswith("//") else line)
        except KeyboardInterrupt:
            chat.console.print(Text("\ninterrupted", "dim"))


def _whole_text(line: str) -> str:
    """Return a line as text; bytes that the input's encoding lacks are read as UTF-8.

    Raises UnicodeError for bytes that are no UTF-8 either, and for lone surrogates.
    """
    return line.encode("utf-8", "surrogateescape").decode("utf-8")


def _not_text(error: UnicodeError) -> str:
    """Describe the byte or half character that makes a line no text."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"its byte {error.start + 1} (0x{byte:02x}) is not UTF-8; write it in UTF-8"
    return "it has half a character, which no text can hold"


def _command(chat: _Chat, line: str) -> bool:
    """Carry out a slash command; return False when the chat is over."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        chat.console.print(Text(HELP, "dim"))
    elif name == "/reset":
        for speaker in chat.speakers:
            speaker.turns.clear()
        chat.console.print(Text("The conversation starts anew.", "dim"))
    elif name == "/system":
        if rest.strip() and (refusal := _system_refused(chat.speakers, rest.strip())):
            chat.console.print(Text(f"The system prompt is not set. {refusal}", "yellow"))
        elif rest.strip():
            chat.system = rest.strip()
            chat.console.print(Text("The system prompt is set; /reset forgets the turns.", "dim"))
        else:
            chat.console.print(Text(f"System prompt: {chat.system or '(none)'}", "dim"))
    else:
        chat.console.print(Text(f"There is no command {name}. /help lists them.", "yellow"))
    return True


def _system_refused(speakers: Sequence[_Speaker], system: str) -> str:
    """Return a sentence on a model that would not get a system prompt; empty if all would."""
    turns = (Turn("system", system), Turn("user", "Hello."))
    for speaker in speakers:
        try:
            prompt_ids(speaker.tokenizer, speaker.template, turns)
        except UserError as error:
            return f"{speaker.label}: {error}"
        if reason := speaker.omissions.of_prompt(turns):
            return f"{speaker.label}: {reason} ({speaker.template.name})."
    return ""


def _ask(chat: _Chat, message: str) -> None:
    """Send a message to every speaker."""
    chat.asked += 1
    many = len(chat.speakers) > 1
    room = chat.console.width // len(chat.speakers)
    if many and chat.console.is_terminal and room >= _COLUMN_WIDTH:
        _ask_in_columns(chat, message)
        return
    for speaker in chat.speakers:
        if many:
            chat.console.print(Text(f"\n{speaker.label}", "bold cyan"))

        def show(piece: str) -> None:
            chat.console.print(Text(_visible(piece)), end="", soft_wrap=True)

        remarks = _answer(chat, speaker, message, show)
        chat.console.print()
        _print_remarks(chat, remarks)


def _ask_in_columns(chat: _Chat, message: str) -> None:
    """Show growing answers side by side, and keep the table at the end."""
    texts = ["" for _ in chat.speakers]
    remarks: list[str] = []

    def table() -> Table:
        columns = Table(box=box.ROUNDED, expand=True, header_style="bold cyan")
        for speaker in chat.speakers:
            columns.add_column(Text(speaker.label), ratio=1, overflow="fold")
        columns.add_row(*(Text(text) for text in texts))
        return columns

    with Live(get_renderable=table, console=chat.console, transient=True, refresh_per_second=10):
        for i, speaker in enumerate(chat.speakers):

            def show(piece: str, i: int = i) -> None:
                texts[i] += _visible(piece)

            remarks += [f"{speaker.label}: {r}" for r in _answer(chat, speaker, message, show)]
    chat.console.print(table())
    _print_remarks(chat, remarks)


def _print_remarks(chat: _Chat, remarks: Sequence[str]) -> None:
    for remark in remarks:
        chat.console.print(Text(remark, "yellow"))


def _answer(chat: _Chat, speaker: _Speaker, message: str, show: Callable[[str], None]) -> list[str]:
    """Stream one speaker's answer, add it to its history, and return remarks for the user."""
    turns = [*speaker.turns, Turn("user", message)]
    try:
        prompt, kept, dropped = _fit(chat, speaker, turns)
    except UserError as error:
        return [str(error)]
    remarks = []
    system = [Turn("system", chat.system)] if chat.system else []
    if reason := speaker.omissions.of_prompt([*system, *kept]):
        remarks.append(f"The model was not asked all of this: {reason}.")
    if dropped:
        remarks.append(
            f"The oldest {dropped} {'turn' if dropped == 1 else 'turns'} no longer fit the context "
            f"of {speaker.context} tokens and were dropped."
        )
    left = chat.sampling.max_new_tokens
    if speaker.context is not None:
        left = min(left, speaker.context - len(prompt))
    answer = stream_answer(
        speaker.model,
        speaker.tokenizer,
        prompt,
        stop=speaker.stop,
        sampling=replace(chat.sampling, max_new_tokens=left),
        seed=None if chat.seed is None else chat.seed + chat.asked - 1,
        on_text=show,
    )
    # A message that was interrupted before any answer counts as not sent.
    speaker.turns = [*kept, Turn("assistant", answer.text)] if answer.tokens else kept[:-1]
    return remarks + _ending(answer, full_context=left < chat.sampling.max_new_tokens)


def _ending(answer: StreamedAnswer, *, full_context: bool) -> list[str]:
    if answer.ended == "interrupted":
        return ["(interrupted)"]
    if answer.ended == "length":
        why = "the context is full" if full_context else "--max_new_tokens"
        return [f"(cut after {answer.tokens} tokens: {why})"]
    return [] if answer.text.strip() else ["(an empty answer)"]


def _fit(chat: _Chat, speaker: _Speaker, turns: list[Turn]) -> tuple[list[int], list[Turn], int]:
    """Return prompt ids that leave room for an answer, the kept turns, and how many were dropped.

    Raises UserError when the last message alone is too long.
    """
    system = [Turn("system", chat.system)] if chat.system else []
    kept = list(turns)
    while True:
        ids = prompt_ids(speaker.tokenizer, speaker.template, [*system, *kept])
        require_rows(ids, speaker.rows, speaker.tokenizer.decode)
        if speaker.context is None:
            return ids, kept, 0
        # At most a quarter of the context stays free, so that a huge max_new_tokens does not push
        # out the whole conversation.
        room = min(chat.sampling.max_new_tokens, max(1, speaker.context // 4))
        if len(ids) + room <= speaker.context:
            return ids, kept, len(turns) - len(kept)
        if len(kept) == 1:
            raise UserError(
                f"This message has {len(ids)} tokens with the template and the system prompt; with "
                f"{room} for an answer that is more than the context of {speaker.context} tokens. "
                "Shorten it."
            )
        del kept[:2]  # a question and its answer


def _load(path: str, label: str, options: ChatOptions, console: Console) -> _Speaker:
    # Imported here so that a test, or another front end, can replace it.
    from tandem.model.load_model import load_for_inference

    model, tokenizer = load_for_inference(
        path, options.device, lambda text: console.print(Text(f"{label}: {text}", "dim"))
    )
    if options.chat_template is None and not tokenizer.chat_template:
        raise UserError(
            f"{path} has no chat template, so it cannot be asked a question. Name one: "
            f"--chat_template {'|'.join(chat_template.template_names())}, or a .jinja file."
        )
    template = chat_template.resolve_template(tokenizer, options.chat_template)
    ends = [*chat_template.stop_ids(tokenizer, template), *model_stop_ids(model)]
    omissions, context = omissions_of(tokenizer, template), context_length(model.config)
    stop = list(dict.fromkeys(ends))
    return _Speaker(label, model, tokenizer, template, stop, context, rows_of(model), omissions)


def _check(models: Sequence[str], sampling: Sampling) -> None:
    if not models:
        raise UserError("tandem chat needs a model: a folder or a Hub id.")
    if sampling.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {sampling.max_new_tokens}; it must be at least 1.")
    if sampling.temperature < 0:
        raise UserError(f"--temperature is {sampling.temperature}; it must be 0 (greedy) or more.")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"--top_p is {sampling.top_p}; it must be above 0 and at most 1.")


def _visible(text: str) -> str:
    """Remove control characters, which would steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
