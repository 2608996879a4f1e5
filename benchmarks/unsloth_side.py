"""Unsloth patches the libraries under it, so it is imported before they are."""

from __future__ import annotations

import unsloth  # noqa: F401  # isort: skip

from .sides import main

if __name__ == "__main__":
    main()
