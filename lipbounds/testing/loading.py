"""Finding a bound by its import path, and the import path of a bound."""

from __future__ import annotations

import sys
from typing import Any

from lipbounds.claims import FEATURES, Claim, Source
from lipbounds.errors import InvalidInput
from lipbounds.imports import import_object
from lipbounds.registry import BoundSpec, registry


def load_spec(path: str) -> BoundSpec:
    """The bound at `package.module:attribute`, or the registered one of that name if there is no colon.

    A plain function of an `Attention` is taken at its word: a proved bound at the point, for every feature.

    Args:
        path: where a `BoundSpec` or a function lies, or a registered name.

    Raises:
        InvalidInput: nothing can be imported there, or it is neither a BoundSpec nor a function.
        UnknownBound: no bound of that name is registered.
    """
    if ":" not in path:
        return registry.get(path)
    found = import_object(path, "a bound")
    if isinstance(found, BoundSpec):
        return found
    if not callable(found):
        raise InvalidInput(
            f"{path} must be a BoundSpec or a function of an Attention, got {type(found).__name__}; "
            "decorate the function with lipbounds.bound(...)."
        )
    compute: Any = found
    return BoundSpec(
        name=path,
        claim=Claim(kind="proved", scope="point"),
        source=Source(title=path),
        supports=frozenset(FEATURES),
        cost="not stated",
        compute=compute,
    )


def expression(spec: BoundSpec) -> str | None:
    """Python source that finds `spec` again, given `import lipbounds` and `load_spec`; None if nothing does."""
    if ":" in spec.name:
        return f"load_spec({spec.name!r})"
    name = spec.compute.__module__
    members = vars(sys.modules[name]) if name in sys.modules else {}
    attributes = [attribute for attribute, member in members.items() if member is spec]
    if attributes and not name.startswith("lipbounds."):
        return f"load_spec({name + ':' + attributes[0]!r})"
    return f"lipbounds.get({spec.name!r})" if spec in list(registry) else None
