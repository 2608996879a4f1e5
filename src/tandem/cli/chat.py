"""`tandem chat MODEL [MODEL ...]`: talking to what came out."""

from __future__ import annotations

import argparse

from tandem.cli.parser import Parser, path, positive, seed
from tandem.recipe.flags import DEVICES


def chat(argv: list[str]) -> int:
    """Talk to one model, or to several side by side."""
    arguments = _chat_parser().parse(argv)
    from tandem.chat.session import run_chat
    from tandem.integrations.choose import choose_device
    from tandem.runtime.console import result_console

    device = choose_device(arguments.device, "auto")
    run_chat(
        arguments.models,
        system=arguments.system,
        chat_template=arguments.chat_template,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        device=str(device.torch_device),
        console=result_console(),
    )
    return 0


def _chat_parser() -> Parser:
    parser = Parser(
        prog="tandem chat",
        usage="tandem chat MODEL [MODEL ...] [flags]",
        description="Streaming chat with a model folder, an adapter folder or a Hub id; several "
        "answer side by side.",
    )
    parser.add_argument(
        "models", type=path, metavar="MODEL", nargs="+", help="model, adapter or run folder"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--chat_template",
        type=path,
        metavar="NAME|FILE",
        help="default: the one saved with the model",
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, default=256, metavar="N", help="of an answer (256)"
    )
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.7,
        metavar="X",
        help="0 always takes the likeliest token (0.7)",
    )
    parser.add_argument(
        "--top_p", type=_share, default=0.95, metavar="X", help="nucleus sampling (0.95)"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="makes sampled answers repeatable")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to answer")
    return parser


def _not_negative(text: str) -> float:
    number = _number(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
