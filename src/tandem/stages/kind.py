"""How training stages differ, and what they hand to their objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from tandem.data.records import Tree
from tandem.data.trees import Trees
from tandem.train.engine import Engine
from tandem.train.memory import TokenBudget
from tandem.train.objective import Objective


@dataclass(frozen=True)
class Start:
    """What an objective may need when it is made: the engine holds the untrained policy.

    `what` is a word before the records' name on the console, such as held-out.
    """

    engine: Engine
    model: Any
    trees: Sequence[Tree]
    model_hash: str
    backend: str
    numerics: str
    budget: TokenBudget
    console: Console
    what: str = ""


@dataclass(frozen=True)
class Made:
    """An objective and what making it cost."""

    objective: Objective
    reference_seconds: float = 0.0
    reference_computed: int = 0


@dataclass(frozen=True)
class StageKind:
    """How one training stage differs from the other.

    `prepare` reads and encodes its data, `make_objective` says what a step minimises, `dropout`
    whether the adapter's dropout may be on, `warnings` looks over the finished metrics.
    """

    name: str
    prepare: Callable[..., Trees]
    make_objective: Callable[[Start], Made]
    dropout: bool
    warnings: Callable[[list[dict[str, Any]]], list[str]]
