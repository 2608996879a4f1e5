"""Packages that only some runs need: there, or a message that says how to get them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tandem.errors import UserError


def require(package: str, extra: str, why: str) -> None:
    """Raise UserError unless a package is installed.

    Args:
        package: the distribution's name, `deepspeed` for instance.
        extra: the extra of tandem that installs it.
        why: what needs it, as the beginning of a sentence: `engine: deepspeed-zero2`.
    """
    try:
        version(package)
    except PackageNotFoundError:
        raise UserError(
            f"{why} needs the package {package}, which is not installed here. Install it with "
            f"pip install '.[{extra}]' in the folder of tandem's sources"
        ) from None
