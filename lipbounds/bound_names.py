"""Registered bounds as attributes: `lipbounds.bounds.yudin2025.biased`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lipbounds.errors import UnknownBound
from lipbounds.registry import get, standing


class BoundNames:
    """The registered bounds whose names begin with a prefix, as attributes: `lipbounds.bounds.acme.half`.

    Args:
        prefix: without the dot at its end.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        return bound_named(name, self._prefix)

    def __dir__(self) -> list[str]:
        return names_below(self._prefix)

    def __repr__(self) -> str:
        return f"<bounds {self._prefix}.*: {', '.join(dir(self))}>"


class BoundModule(ModuleType):
    """A module of `lipbounds.bounds` whose attributes are also the bounds registered under its name.

    A module that has the name of a bound, such as `sharp`, is called as that bound and has its attributes.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.registered(*args, **options)

    @property
    def registered(self) -> Any:
        """The bound that has the name of this module.

        Raises:
            UnknownBound: there is none.
        """
        return get(_last(self.__name__))

    def __getattr__(self, name: str) -> Any:
        prefix = _last(self.__name__)
        if not name.startswith("_") and prefix in _names() and name not in names_below(prefix):
            return getattr(self.registered, name)
        return bound_named(name, prefix)

    def __dir__(self) -> list[str]:
        return names_below(_last(self.__name__))

    def __repr__(self) -> str:
        prefix = _last(self.__name__)
        return repr(self.registered) if prefix in _names() else repr(BoundNames(prefix))


def name_bounds(package: str) -> Callable[[str], Any]:
    """Make the modules of a package of bounds such modules; returns a `__getattr__` for the package.

    Args:
        package: the full name of the package, its `__name__`, at the end of its import.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith(f"{package}."):
            module.__class__ = BoundModule
    return bound_named


def bound_named(name: str, prefix: str = "") -> Any:
    """The registered bound `prefix.name`, or those whose names begin so.

    Args:
        name: one part of a name.
        prefix: what comes before it, without the dot.

    Raises:
        AttributeError: there is none; near names are suggested.
    """
    full = f"{prefix}.{name}" if prefix else name
    if name.startswith("_"):
        raise AttributeError(name)
    if full not in _names() and names_below(full):
        return BoundNames(full)
    try:
        return get(full)
    except UnknownBound as error:
        raise AttributeError(str(error)) from error


def names_below(prefix: str) -> list[str]:
    """The next parts of the names that begin with a prefix, sorted.

    Args:
        prefix: without the dot at its end; empty for the first parts.
    """
    start = f"{prefix}." if prefix else ""
    return sorted({name.removeprefix(start).partition(".")[0] for name in _names() if name.startswith(start)})


def _names() -> list[str]:
    """Of all standing bounds and estimators; a refuted formula is found by its name and is in no list."""
    return [spec.name for spec in standing()]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
