"""Objects that a user names by their import path."""

from __future__ import annotations

import importlib
import operator
from typing import Any

from lipbounds.errors import InvalidInput


def import_object(path: str, what: str) -> Any:
    """The object at `package.module:attribute`. This runs the code of that module.

    Args:
        path: of the object.
        what: it is, with an article, for the message.

    Raises:
        InvalidInput: nothing can be imported there; whatever the module itself raises is named in the message.
    """
    module, _, attribute = path.partition(":")
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # the module is the user's, and so is what it raises
        raise InvalidInput(
            f"{what} must be given as package.module:attribute, got {path!r} ({type(error).__name__}: {error}); "
            "check the spelling, and that the package is installed or on PYTHONPATH."
        ) from error
