"""`lipbounds bounds`: what is registered."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from lipbounds.cli.console import AsJson, output, print_json


def command(as_json: AsJson = False) -> None:
    """List the bounds and estimators: what each promises, and where it is from."""
    from lipbounds import registry

    rows = [_row(spec) for spec in registry.standing()]
    if as_json:
        print_json({"schema_version": 1, "bounds": rows})
        return
    table = Table(Column("name", no_wrap=True), "kind", "scope", "norm", "source")
    for row in rows:
        table.add_row(*(escape(row[name]) for name in ("name", "kind", "scope", "norm", "source")))
    output.print(table)


def _row(spec: Any) -> dict[str, Any]:
    return {
        "name": spec.name,
        "role": spec.role,
        "target": spec.target.__name__,
        "kind": spec.claim.kind,
        "scope": spec.claim.scope,
        "norm": spec.claim.norm,
        "supports": sorted(spec.supports),
        "cost": spec.cost,
        "version": spec.version,
        "source": str(spec.source),
        "summary": spec.summary,
    }
