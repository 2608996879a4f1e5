"""Losses of the user's own: functions of pairs, given by Python code or named `module:function`.

A recipe that names one is read without the function: its module is imported when a stage begins.
"""

from __future__ import annotations

import dis
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

from tandem.errors import UserError
from tandem.losses.registry import PREFERENCE_LOSSES, PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.losses.answers import AnswerLogps

Function = TypeVar("Function", bound=Callable[..., Any])

_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.<>]*")
_DECLARED = "__tandem_reference__"
_PLAIN = (int, float, str, bool, type(None))
# Functions that Python code gave, by the name that settings have for them.
_given: dict[str, Callable[..., Any]] = {}


def custom_loss(*, reference: bool = True) -> Callable[[Function], Function]:
    """Say of a loss of your own whether it needs a reference; without this decorator it does.

    Args:
        reference: whether `AnswerLogps.reference` and `.ratio` are used. Without a reference there
            is no reference pass before the first step.
    """

    def declare(function: Function) -> Function:
        setattr(function, _DECLARED, reference)
        return function

    return declare


def is_custom(name: str) -> bool:
    """Whether a loss's name is that of a function of the user's own."""
    return ":" in name


def check_name(name: str) -> None:
    """Raise ValueError for a name that no function can have."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} names no function; write it as module:function")


def give_loss(function: Callable[..., Any]) -> str:
    """Let settings name a function; returns the name.

    Raises UserError for what is no function with a name and source text of its own.
    """
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        what = getattr(function, "__name__", type(function).__name__)
        raise UserError(
            f"loss: {what} is no function with a name; write it with def, so that tandem can tell "
            "whether it has changed"
        )
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise UserError(
            f"loss: {function.__name__} uses variables of the function around it ({names}), by "
            "which it may change without a change of its text; make them keyword arguments with "
            "defaults"
        )
    name = f"{function.__module__}:{function.__qualname__}"
    _given[name] = function
    identity_of_loss(name)  # a function without source text is refused now
    return name


def find_custom(name: str) -> PreferenceLoss:
    """The loss of a function's name, imported if Python code has not given it.

    Raises UserError for a function that is not there, and for one that cannot be called as a loss.
    """
    function = _function(name)
    return PreferenceLoss(
        name=name,
        compute=_checked(name, function),
        compared="pairs",
        reference=(reference := bool(getattr(function, _DECLARED, True))),
        statistic=None,
        options=_options(name, function),
        reward="ratio" if reference else "policy",
        about=None,
    )


def identity_of_loss(name: str) -> str:
    """A hash of all that a function's values depend on, as far as Python tells it.

    That is its source text, its defaults, and the constants and functions of its module that it
    uses. Raises UserError for a function without source text.
    """
    from tandem.storage.hashing import hash_json

    function = _function(name)
    return hash_json([getattr(function, _DECLARED, True), _identity(function, set())])


def lasting_name(name: str) -> str:
    """A loss's name for fingerprints: a function goes by its text, wherever it stands."""
    if not is_custom(name):
        return name
    return f"{name.rpartition(':')[2].rpartition('.')[2]} {identity_of_loss(name)[:16]}"


def check_custom(loss: PreferenceLoss, options: Mapping[str, Any]) -> None:
    """Call a loss of the user's own with three made pairs, before anything is computed with it.

    Raises UserError for one that raises, does not return a finite loss of each pair, or has no
    finite gradient.
    """
    import torch

    from tandem.losses.answers import AnswerLogps

    def answer(*policy: float) -> AnswerLogps:
        given = torch.tensor(policy, requires_grad=True)
        reference = (given.detach() - 0.25) if loss.reference else None
        return AnswerLogps(given, reference, torch.tensor([4.0, 7.0, 3.0]), 4.0)

    chosen, rejected = answer(-5.0, -11.5, -3.25), answer(-6.5, -9.0, -4.0)
    with torch.enable_grad():
        total = loss.compute(chosen, rejected, **options).sum()
        gradients = torch.autograd.grad(total, (chosen.policy, rejected.policy), allow_unused=True)
    there = [one for one in gradients if one is not None]
    if not all(bool(one.isfinite().all()) for one in there):
        raise UserError(f"loss {loss.name} has a gradient that is not finite, for ordinary pairs")


def _function(name: str) -> Callable[..., Any]:
    if name in _given:
        return _given[name]
    module = name.partition(":")[0]
    if module == "__main__" or "<" in name:
        raise UserError(
            f"loss: {name} is a function of a script or notebook, which has to give it itself. Put "
            f"it into a file such as my_losses.py, and name it my_losses:{name.rpartition(':')[2]}"
        )
    from tandem.runtime.user_code import load_function

    return load_function(name, "loss")


def _options(name: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """The settings that a function asks for by keyword; others must have defaults of their own."""
    settings = {one for loss in PREFERENCE_LOSSES.values() for one in loss.options}
    taken, two = [], 0
    for one in inspect.signature(function).parameters.values():
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            two += one.default is one.empty
        elif one.kind is one.KEYWORD_ONLY and one.name in settings:
            taken.append(one.name)
        elif one.kind is one.KEYWORD_ONLY and one.default is one.empty:
            raise UserError(
                f"loss {name} asks for {one.name}, which is no setting of a loss; give it a "
                f"default. Settings are {', '.join(sorted(settings))}"
            )
    if two != 2:
        raise UserError(
            f"loss {name} takes {two} arguments, and is called with two: the chosen and the "
            "rejected answers; settings that it uses come after a *"
        )
    return tuple(taken)


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function whose mistakes are told in its name."""
    calls = 0

    @wraps(function)
    def compute(chosen: AnswerLogps, rejected: AnswerLogps, **options: Any) -> Tensor:
        nonlocal calls
        try:
            value = function(chosen, rejected, **options)
        except Exception as error:
            raise UserError(f"loss {name} raised {_told(error, function)}") from error
        if problem := _problem(value, chosen, first=calls == 0):
            raise UserError(f"loss {name} {problem}")
        calls += 1
        result: Tensor = value
        return result

    return compute


def _told(error: Exception, function: Callable[..., Any]) -> str:
    """An error and the line of the user's function that it came from."""
    file = inspect.getsourcefile(function)
    lines = [
        one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == file
    ]
    place = f" (line {lines[-1]} of {Path(file).name})" if file and lines else ""
    return f"{type(error).__name__}: {error}{place}"


def _problem(value: Any, chosen: AnswerLogps, *, first: bool) -> str:
    """What is wrong with a returned loss; empty if nothing is."""
    import torch

    pairs = chosen.policy
    if not isinstance(value, torch.Tensor):
        return f"returned {type(value).__name__}; it must return a tensor, a loss of each pair"
    if value.shape != pairs.shape:
        return (
            f"returned the shape {list(value.shape)} for {len(pairs)} pairs; it must return one "
            f"loss of each pair, {list(pairs.shape)}, neither summed nor averaged"
        )
    if torch.is_grad_enabled() and pairs.requires_grad and not value.requires_grad:
        return "returned a loss without a gradient; compute it from chosen.policy or chosen.ratio"
    # Elsewhere than on a CPU it would make the device wait; a gradient that is not finite stops a
    # step there as well.
    if (first or value.device.type == "cpu") and not bool(value.detach().isfinite().all()):
        return "returned a loss that is not finite"
    return ""


def _identity(function: Callable[..., Any], seen: set[int]) -> list[Any]:
    """A function's text and defaults, and those of what it uses of its own module."""
    from tandem.runtime.user_code import identity_of

    seen.add(id(function))
    assert isinstance(function, FunctionType)
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    parts: list[Any] = [identity_of(function), [repr(one) for one in defaults if _is_plain(one)]]
    for name in sorted(set(_globals_of(function.__code__))):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType):
            if value.__module__ == function.__module__ and id(value) not in seen:
                parts.append([name, _identity(value, seen)])
        elif name in function.__globals__ and _is_plain(value):
            parts.append([name, repr(value)])
    return parts


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _globals_of(code: CodeType) -> Iterator[str]:
    """The global names that a function's code reads, inner functions included."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)
