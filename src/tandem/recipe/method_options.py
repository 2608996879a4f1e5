"""Which options of a training stage each schedule uses; the others have no effect beside it."""

from __future__ import annotations

# Names that are not here, which Python code has added, may use every option.
SCHEDULE_OPTIONS: dict[str, frozenset[str]] = {
    "linear": frozenset({"min_lr_ratio"}),
    "cosine": frozenset({"min_lr_ratio"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "wsd": frozenset({"min_lr_ratio", "decay_ratio"}),
    "polynomial": frozenset({"min_lr_ratio", "lr_power"}),
}
_METHODS = {"lr_scheduler": SCHEDULE_OPTIONS}


def without_effect(lr_scheduler: str) -> dict[str, tuple[str, str]]:
    """The options that these methods do not use, each with the key and value that say so."""
    idle = {}
    for key, chosen in {"lr_scheduler": lr_scheduler}.items():
        table = _METHODS[key]
        options = frozenset[str]().union(*table.values())
        for option in options - table.get(chosen, options):
            idle[option] = (key, chosen)
    return idle


def in_words(method: tuple[str, str]) -> str:
    """A method as a recipe says it."""
    return f"{method[0]}: {method[1]}"
