"""Submodules that are imported at their first use, and modules that are called.

Importing torch takes seconds, and `import lipbounds` should take none of them. So nothing here imports torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that can be called as the function that has its name: `lipbounds.capture(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[self.__dict__["_called"]](*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__dict__[self.__dict__["_called"]])


def make_callable(module: str, function: str) -> None:
    """Let a call of a module be a call of one of its functions.

    Args:
        module: the full name of a module that is being imported, its `__name__`.
        function: the name of the function in it.
    """
    found = sys.modules[module]
    found.__class__ = CallableModule
    found.__dict__["_called"] = function


def submodules(package: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package that imports its submodules at their first use.

    Args:
        package: the full name of the package, its `__name__`.
    """

    def find(name: str) -> Any:
        full = f"{package}.{name}"
        if not name.startswith("_") and find_spec(full) is not None:
            return importlib.import_module(full)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
