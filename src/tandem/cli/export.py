"""`tandem export gguf|ollama|check`: models for other programs, compared with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.cli.parser import Parser, add_flag, path
from tandem.errors import UserError, nearest
from tandem.recipe.flags.flag import flag_of
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.launch import announce

_FORMATS = ("f32", "f16", "bf16", "q8_0")
_WHAT = {
    "gguf": "a GGUF file for llama.cpp and whatever is built on it, read back and compared",
    "ollama": "a folder for Ollama: that file, and a Modelfile with the chat template",
    "check": "compare a GGUF file, whoever wrote it, with a model",
}


def export(argv: list[str]) -> int:
    """Write a model for another program, or compare a file with a model."""
    what, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if what in ("--help", "-h"):
        _overview().parse(["--help"])
    if what not in _WHAT:
        raise UserError(
            f"tandem export: {what} is nothing to export.{nearest(what, _WHAT)} It is one of "
            f"{', '.join(_WHAT)}. See tandem export --help"
        )
    return _check(rest) if what == "check" else _write(what, rest)


def _write(what: str, argv: list[str]) -> int:
    arguments = _write_parser(what).parse(argv)
    output = Path(arguments.output)
    announce(f"export {arguments.model} -> {output}")
    from tandem.export.choices import ExportJob, check_request
    from tandem.export.converter import find_converter
    from tandem.model.base_model import check_model
    from tandem.runtime.console import notice_console, result_console
    from tandem.storage.run_folder import model_in_run

    check_request(output)
    check_model(model_in_run(arguments.model))
    converter = None if arguments.converter is None else find_converter(arguments.converter)
    job = ExportJob(
        arguments.model,
        output,
        format=arguments.type,
        chat_template=arguments.chat_template,
        name=arguments.name,
        converter=converter,
        system=getattr(arguments, "system", None),
    )
    if what == "gguf":
        from tandem.export.export_gguf import export_gguf as run
    else:
        from tandem.export.ollama import export_ollama as run

    written = run(job, notice_console())
    result_console().print(f"exported: {written}", markup=False, soft_wrap=True)
    return 0


def _check(argv: list[str]) -> int:
    arguments = _check_parser().parse(argv)
    announce(f"compare {arguments.file} with {arguments.model}")
    from tandem.export.export_gguf import check_gguf
    from tandem.runtime.console import notice_console, result_console

    compared = check_gguf(
        Path(arguments.file), arguments.model, arguments.chat_template, notice_console()
    )
    console = result_console()
    for line in compared.lines():
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{arguments.file} is {arguments.model}", markup=False, soft_wrap=True)
    return 0


def _overview() -> Parser:
    width = max(map(len, _WHAT))
    lines = "\n".join(f"  {name:<{width}}  {about}" for name, about in _WHAT.items())
    return Parser(
        prog="tandem export",
        usage="tandem export {gguf,ollama,check} ...",
        description="Models for other programs. What is written is read back and compared with the "
        "model;\na file that does not agree is not kept.",
        epilog=f"{lines}\n\ntandem export gguf --help says what one takes.",
    )


def _write_parser(what: str) -> Parser:
    parser = Parser(
        prog=f"tandem export {what}",
        usage=f"tandem export {what} MODEL --output {'FILE' if what == 'gguf' else 'FOLDER'} "
        "[flags]",
        description=f"Writes {_WHAT[what]}.",
        epilog=f"example: tandem export {what} runs/demo --output "
        f"{'demo.gguf' if what == 'gguf' else 'demo-ollama'} --type q8_0",
    )
    add = parser.add_argument
    about = "A run's folder (its newest model), a merged model's folder, or a Hub id."
    add("model", type=path, metavar="MODEL", help=about)
    add("--output", type=path, required=True, metavar="FILE" if what == "gguf" else "FOLDER",
        help="Where it goes; nothing may be there.")  # fmt: skip
    add("--type", choices=_FORMATS, help="Number format of matrices; by default as stored.")
    _add_template(parser)
    add("--name", metavar="TEXT", help="What the file calls the model; by default its folder.")
    about = "Let llama.cpp's convert_hf_to_gguf.py write the file; auto finds it on PATH."
    add("--converter", type=path, metavar="PATH", help=about)
    if what == "ollama":
        add("--system", metavar="TEXT", help="The system prompt where a request has none.")
    return parser


def _check_parser() -> Parser:
    parser = Parser(
        prog="tandem export check",
        usage="tandem export check FILE MODEL [flags]",
        description="Compares the weights, settings, tokenizer and chat template of a GGUF file "
        "with a model's.",
        epilog="example: tandem export check model-q4_k_m.gguf runs/demo",
    )
    add = parser.add_argument
    add("file", type=path, metavar="FILE", help="A .gguf file.")
    add("model", type=path, metavar="MODEL", help="The model that it was made of.")
    _add_template(parser)
    return parser


def _add_template(parser: Any) -> None:
    about = "A shipped one or a file; by default the one saved with the model."
    add_flag(parser, flag_of(RunSettings, "chat_template", help=about), default=None)
