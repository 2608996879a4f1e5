"""tandem: from a base language model to an aligned chat model, in two stages.

The functions of the Python API are loaded when they are asked for, so that `import tandem` and the
commands start at once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.api.adapters import LoRA as LoRA
    from tandem.api.checking import Findings as Findings
    from tandem.api.checking import check as check
    from tandem.api.data import source as source
    from tandem.api.evaluation import Evaluation as Evaluation
    from tandem.api.evaluation import evaluate as evaluate
    from tandem.api.recipes import Plan as Plan
    from tandem.api.recipes import RunResult as RunResult
    from tandem.api.recipes import plan as plan
    from tandem.api.recipes import run as run
    from tandem.api.result import Result as Result
    from tandem.api.training import dpo as dpo
    from tandem.api.training import sft as sft
    from tandem.errors import Stopped as Stopped
    from tandem.errors import TandemError as TandemError
    from tandem.errors import UserError as UserError
    from tandem.losses.answers import AnswerLogps as AnswerLogps
    from tandem.losses.custom import custom_loss as custom_loss
    from tandem.recipe.recipe import Recipe as Recipe

__version__ = "0.1.0"

# In a notebook torch is often imported before tandem's first call, which sets this otherwise, see
# `api/session.py`: with another program on one of the cores, training takes many times as long.
if "ipykernel" in sys.modules or hasattr(sys, "ps1"):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The module of each public name.
_HOMES = {
    "sft": "tandem.api.training",
    "dpo": "tandem.api.training",
    "run": "tandem.api.recipes",
    "evaluate": "tandem.api.evaluation",
    "check": "tandem.api.checking",
    "plan": "tandem.api.recipes",
    "LoRA": "tandem.api.adapters",
    "source": "tandem.api.data",
    "custom_loss": "tandem.losses.custom",
    "AnswerLogps": "tandem.losses.answers",
    "Result": "tandem.api.result",
    "RunResult": "tandem.api.recipes",
    "Evaluation": "tandem.api.evaluation",
    "Findings": "tandem.api.checking",
    "Plan": "tandem.api.recipes",
    "Recipe": "tandem.recipe.recipe",
    "TandemError": "tandem.errors",
    "UserError": "tandem.errors",
    "Stopped": "tandem.errors",
}
__all__ = ["__version__", *_HOMES]
# Functions that have the name of a package within this one.
_ALSO_PACKAGES = ("check", "evaluate", "plan")


class _CallablePackage(ModuleType):
    """A package that is called as the function of its name: `tandem.check(data)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_HOMES[name]), name)

    @property
    def __signature__(self) -> Any:
        """The function's signature, for editors and `help`."""
        import inspect

        return inspect.signature(self._function)


class _Package(ModuleType):
    """This package. Python sets its packages as attributes, in the place of equal functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ALSO_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _ALSO_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
