"""tandem: from a base language model to an aligned chat model, in two stages."""

from __future__ import annotations

__version__ = "0.1.0"
