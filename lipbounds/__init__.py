"""Compare, verify and use local Lipschitz bounds of transformers.

The public names are those of `lipbounds._public`. They are imported at their first use: torch takes seconds to import,
and `lipbounds --help` passes through here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lipbounds._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        public = importlib.import_module("lipbounds._public")
        globals().update({key: value for key, value in vars(public).items() if not key.startswith("_")})
        if name in globals():  # a public name, or a submodule that came in with them
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    public = importlib.import_module("lipbounds._public")
    return sorted({*globals(), *vars(public)})
