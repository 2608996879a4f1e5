"""Which options of a training stage each optimizer and schedule uses; others have no effect."""

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
_ADAM = frozenset({"adam_beta1", "adam_beta2", "adam_epsilon"})
OPTIMIZER_OPTIONS: dict[str, frozenset[str]] = {
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "adafactor": frozenset(),
    "lion": frozenset({"lion_beta1", "lion_beta2"}),
    "muon": _ADAM | {"muon_momentum"},  # AdamW's are for what is no matrix
    "schedule_free_adamw": _ADAM,
}
_METHODS = {"optimizer": OPTIMIZER_OPTIONS, "lr_scheduler": SCHEDULE_OPTIONS}


def without_effect(optimizer: str, lr_scheduler: str) -> dict[str, tuple[str, str]]:
    """The options that these methods do not use, each with the key and value that say so."""
    idle = {}
    for key, chosen in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        table = _METHODS[key]
        options = frozenset[str]().union(*table.values())
        for option in options - table.get(chosen, options):
            idle[option] = (key, chosen)
    return idle


def in_words(method: tuple[str, str]) -> str:
    """A method as a recipe says it."""
    return f"{method[0]}: {method[1]}"
