"""The errors a caller can meet. Each message says what must hold, what was got, and what to do instead."""

from __future__ import annotations


class LipboundsError(Exception):
    """Base of every error this library raises on purpose."""


class InvalidInput(LipboundsError, ValueError):
    """An argument breaks a rule that its docstring states."""


class Unsupported(LipboundsError, NotImplementedError):
    """The method exists, but not for this kind of input."""


class UnsupportedAttention(Unsupported):
    """A bound was asked about an attention block with a feature that it does not cover."""


class UnknownBound(LipboundsError, KeyError):
    """No bound or estimator of that name is registered."""

    # KeyError prints the repr of its argument; a sentence for people must be printed as it is.
    __str__ = Exception.__str__


def install_advice(extra: str) -> str:
    """What to run to get the packages of an extra, for the end of a message.

    Args:
        extra: its name in pyproject.toml.
    """
    return f"run `pip install -e '.[{extra}]'` in a copy of the repository of lipbounds."
