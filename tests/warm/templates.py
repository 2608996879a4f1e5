"""Jinja templates, compiled once in a process however often they are asked for.

peft writes a model card with each adapter, and compiles its template anew each time: in a training
stage of the tests' size that is a quarter of the work.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment


def compile_once() -> None:
    """Let each Jinja environment remember what it compiled."""
    plain = Environment.compile
    if getattr(plain, "remembers", False):
        return

    def compiled(self: Environment, source: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(source, str) or args or kwargs:
            return plain(self, source, *args, **kwargs)
        known: dict[str, Any] = self.__dict__.setdefault("tests_compiled", {})
        if source not in known:
            known[source] = plain(self, source)
        return known[source]

    compiled.remembers = True  # type: ignore[attr-defined]
    Environment.compile = compiled  # type: ignore[method-assign,assignment]
