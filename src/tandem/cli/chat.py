"""`tandem chat MODEL [MODEL ...]`: talk to models in the terminal."""

from __future__ import annotations

import argparse

from tandem.cli.parser import Parser, add_flag, number, path, positive, seed
from tandem.recipe.flags.flag import flag_of
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.launch import announce
from tandem.storage.run_folder import model_in_run


def chat(argv: list[str]) -> int:
    """Talk to one model, or to several side by side."""
    arguments = _chat_parser().parse(argv)
    from tandem.model.base_model import check_model

    announce(f"chat with {', '.join(arguments.models)}")
    for model in arguments.models:
        check_model(model_in_run(model))
    from tandem.chat.session import ChatOptions, run_chat
    from tandem.integrations.choose import choose_device
    from tandem.model.generate import Sampling
    from tandem.runtime.console import result_console

    device = choose_device(arguments.device, "auto")
    run_chat(
        arguments.models,
        ChatOptions(
            Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p),
            system=arguments.system,
            chat_template=arguments.chat_template,
            seed=arguments.seed,
            device=str(device.torch_device),
        ),
        result_console(),
    )
    return 0


def _chat_parser() -> Parser:
    parser = Parser(
        prog="tandem chat",
        usage="tandem chat MODEL [MODEL ...] [flags]",
        description="Streaming chat with a model folder, an adapter folder or a Hub id; several "
        "answer side by side.",
    )
    add = parser.add_argument
    add("models", type=path, metavar="MODEL", nargs="+", help="A model, adapter or run folder.")
    add("--system", metavar="TEXT", help="The system prompt.")
    template = "A shipped one or a file; by default the one saved with the model."
    add_flag(parser, flag_of(RunSettings, "chat_template", help=template))
    add("--max_new_tokens", type=positive, default=256, metavar="N",
        help="Tokens of an answer at most (256).")  # fmt: skip
    add("--temperature", type=_not_negative, default=0.7, metavar="X",
        help="0 always takes the likeliest token (0.7).")  # fmt: skip
    add("--top_p", type=_share, default=0.95, metavar="X", help="Nucleus sampling (0.95).")
    add("--seed", type=seed, metavar="N", help="Makes sampled answers repeatable.")
    device = flag_of(RunSettings, "device", help="The device to answer on.")
    add_flag(parser, device, default="auto")
    return parser


def _not_negative(text: str) -> float:
    value = number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def _share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
