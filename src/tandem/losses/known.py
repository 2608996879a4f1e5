"""All losses, found by name."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.errors import UserError, nearest
from tandem.losses import labelled, listwise, paired, reference_free
from tandem.losses.custom import find_custom, is_custom
from tandem.losses.registry import PREFERENCE_LOSSES, PreferenceLoss

# A loss is registered when its module is imported.
LOSS_MODULES = (paired, reference_free, labelled, listwise)


def known_losses(names: Iterable[str]) -> list[PreferenceLoss]:
    """The losses of the names; without those that a finished run used and that are gone."""
    return [PREFERENCE_LOSSES[name] for name in names if name in PREFERENCE_LOSSES]


def find_loss(name: str) -> PreferenceLoss:
    """The loss of a name; a `module:function` is imported.

    Raises UserError, with the names there are, for another one.
    """
    if is_custom(name):
        return find_custom(name)
    if name not in PREFERENCE_LOSSES:
        names = sorted(PREFERENCE_LOSSES)
        raise UserError(
            f"there is no loss {name!r}.{nearest(name, names)} Losses: {', '.join(names)}; one of "
            "your own is written module:function."
        )
    return PREFERENCE_LOSSES[name]
