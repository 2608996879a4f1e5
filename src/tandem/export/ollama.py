"""Exports a model for Ollama: a GGUF file, and a Modelfile that writes the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.records import Turn
from tandem.errors import UserError
from tandem.export.choices import ExportJob, check_request
from tandem.export.compare_tokens import ChatModel, in_words, model_ids
from tandem.export.export_gguf import plan_vocabulary, reporter, write_compared
from tandem.export.file_tokenizer import FileTokenizer
from tandem.export.go_template import KNOWN, known_templates, render_go
from tandem.export.probes import CONVERSATIONS, PADDED
from tandem.export.source import read_source
from tandem.export.vocabulary import FileVocabulary
from tandem.storage.atomic_files import atomic_folder, read_json_object

_FILE = "model.gguf"
# Keys of generation_config.json, and what Ollama calls them.
_PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


def export_ollama(job: ExportJob, console: Console) -> Path:
    """Write a folder that `ollama create` reads; returns it.

    Raises UserError as `export_gguf` does, and for a chat template that no known Go template
    writes.
    """
    report = reporter(console)
    check_request(job.output)
    source = read_source(job.model, job.chat_template, report)
    vocabulary = plan_vocabulary(job, source, report)
    name, template = choose_template(vocabulary, source.chat)
    stops = [vocabulary.tokens[index] for index in source.chat.stops if index < source.chat.rows]
    modelfile = modelfile_text(template, stops, parameters_of(source.folder), job.system)
    with atomic_folder(job.output) as aside:
        write_compared(job, source, vocabulary, aside / _FILE, console)
        (aside / "Modelfile").write_text(modelfile, encoding="utf-8")
    if _compare(template, vocabulary, source.chat, (PADDED,))[1] is not None:
        report(
            "Ollama leaves blanks around a message, the model's own template takes them away: "
            "messages with such blanks get other tokens",
            "yellow",
        )
    report(
        f"the Modelfile's template ({name}) writes the tokens of the model's own for "
        f"{_rendered_count(source.chat)} conversations -> {job.output}"
    )
    return job.output


def choose_template(own: FileVocabulary, model: ChatModel) -> tuple[str, str]:
    """The known Go template that writes every probe conversation as the model's template does.

    Returns its name and text. Conversations that the model's template refuses are left out. Raises
    UserError where none does.
    """
    special = ["" if index is None else own.tokens[index] for index in (own.bos, own.eos)]
    nearest: tuple[int, str] = (-1, "")
    for name, text in known_templates(*special):
        alike, difference = _compare(text, own, model)
        if difference is None and alike:
            return name, text
        nearest = max(nearest, (alike, f"{name}: {difference}"), key=lambda one: one[0])
    raise UserError(
        f"chat template {model.template.name!r} is none of those that tandem can write in Go's "
        f"template language ({', '.join(KNOWN)}), which Ollama reads; nearest is {nearest[1]}. "
        "Export with tandem export gguf, and write the TEMPLATE of the Modelfile by hand, or serve "
        "the file with llama.cpp, which reads the model's own template."
    )


def _compare(
    text: str,
    own: FileVocabulary,
    model: ChatModel,
    conversations: Sequence[Sequence[Turn]] = CONVERSATIONS,
) -> tuple[int, str | None]:
    """How many conversations agree before one does not, and how that one differs."""
    there, alike = FileTokenizer(own), 0
    for turns in conversations:
        ours = model_ids(model, turns, prompt=True)
        if ours is None:
            continue
        begin = [own.bos] if own.add_bos and own.bos is not None else []
        theirs = [*begin, *there.encode(render_go(text, turns))]
        if ours != theirs:
            return alike, in_words(model, ours, theirs)
        alike += 1
    return alike, None


def _rendered_count(model: ChatModel) -> int:
    return sum(model_ids(model, turns, prompt=True) is not None for turns in CONVERSATIONS)


def parameters_of(folder: Path) -> dict[str, Any]:
    """Ollama's parameters of what a folder's generation_config.json states."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    values = read_json_object(path)
    found = {ours: values[key] for key, ours in _PARAMETERS.items() if values.get(key) is not None}
    if values.get("do_sample") is False:
        found["temperature"] = 0
    return found


def modelfile_text(
    template: str, stops: list[str], parameters: Mapping[str, Any], system: str | None
) -> str:
    """A Modelfile; raises UserError for a text that its quotes cannot hold."""
    for text in (template, system or ""):
        if '"""' in text:
            raise UserError('a Modelfile cannot hold a text with """; change it')
    lines = [f"FROM ./{_FILE}", f'TEMPLATE """{template}"""']
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
