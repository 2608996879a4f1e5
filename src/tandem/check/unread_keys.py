"""The keys of a data set that no reader takes."""

from __future__ import annotations

from dataclasses import dataclass, field

_MOST = 1000  # listed keys at most; rows whose keys are names of things have ever new ones


@dataclass(slots=True)
class UnreadKeys:
    """Collects keys in reading order, up to a number; `cut` says that there are more."""

    cut: bool = False
    _found: dict[str, None] = field(default_factory=dict)

    @property
    def listed(self) -> tuple[str, ...]:
        """The sorted keys, of rows and of turns (`messages[].thought`)."""
        return tuple(sorted(self._found))

    def add(self, key: str) -> None:
        """Note a key."""
        if key in self._found:
            return
        if len(self._found) < _MOST:
            self._found[key] = None
        else:
            self.cut = True

    def merge(self, later: UnreadKeys) -> None:
        """Note the keys of rows that follow."""
        for key in later._found:
            self.add(key)
        self.cut = self.cut or later.cut
