"""`lipbounds bounds`: what is registered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lipbounds.cli.console import AsJson, print_json


def command(
    kind: Annotated[str | None, typer.Option(help="proved, probable, estimate or lower.")] = None,
    scope: Annotated[str | None, typer.Option(help="point, ball, change, compact or global.")] = None,
    norm: Annotated[str | None, typer.Option(help="l2, linf, token or token_mean.")] = None,
    supports: Annotated[
        list[str] | None,
        typer.Option(help="heads, biases, mask, cross, rotary, qk_norm or some_queries; repeatable: all are needed."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Attention, L2Attention, Mlp, ...; all if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the bounds and estimators, one per line: what each promises, and where it is from."""
    from lipbounds import registry
    from lipbounds.bound_spec import BoundTable
    from lipbounds.errors import InvalidInput

    targets = {spec.target.__name__: spec.target for spec in registry.standing()}
    if target is not None and target not in targets:
        raise InvalidInput(f"--target must be one of {', '.join(sorted(targets))}, got {target!r}.")
    matching = (
        registry.select(kind=kind, scope=scope, norm=norm, supports=supports or (), target=of)
        for name, of in targets.items()
        if target in (None, name)
    )
    chosen = BoundTable(sorted((spec for found in matching for spec in found), key=lambda spec: spec.name))
    if as_json:
        print_json({"schema_version": 1, "bounds": [_row(spec) for spec in chosen]})
        return
    print(repr(chosen))  # noqa: T201 - one line per bound, whatever the width: to be read by people, grep and cut


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
