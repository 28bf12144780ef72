"""Bounds of other packages, found by entry points: a broken one costs itself, and nothing else."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lipbounds import UnknownBound, registry
from lipbounds.registry import ENTRY_POINT_GROUP, Registry


GOOD = """
import lipbounds
from lipbounds.claims import Claim, Source

@lipbounds.bound(
    name="acme.good", claim=Claim(kind="proved", scope="point"), source=Source(title="a test"), cost="O(1)"
)
def GOOD(block):
    return block.x.norm()
"""
BROKEN = {
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "leaves": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "misspelt": ("GOOOD = 1", "AttributeError"),
    "no_spec": ("GOOD = 1", "InvalidInput: it must name a BoundSpec, got int"),
    "missing": ("import acme_needs_this", "ModuleNotFoundError: No module named 'acme_needs_this'"),
    "taken": (GOOD.replace("acme.good", "sharp"), "InvalidInput: the name 'sharp' is taken by"),
    "late": (GOOD.replace("acme.good", "acme.half") + "\nraise OSError('late')", "OSError: late"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plug_in_costs_its_own_bound_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = BROKEN[name]
    fresh = Registry()
    names = [spec.name for spec in registry.registry]
    for spec in registry.registry:
        fresh.add(spec)
    for module, text in ((f"acme_{name}", source), (f"acme_good_{name}", GOOD)):
        (tmp_path / f"{module}.py").write_text(text)
    entries = [EntryPoint(m, f"{m}:GOOD", ENTRY_POINT_GROUP) for m in (f"acme_{name}", f"acme_good_{name}")]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    monkeypatch.setattr(registry, "registry", fresh)  # what the decorator adds to
    monkeypatch.delenv("LIPBOUNDS_NO_PLUGINS", raising=False)
    with pytest.warns(RuntimeWarning) as warned:
        found = [spec.name for spec in fresh]
    assert len(warned) == 1
    assert f"entry point 'acme_{name}' (acme_{name}:GOOD)" in str(warned[0].message)
    assert reason in str(warned[0].message)
    assert found == sorted([*names, "acme.good"])
    with pytest.raises(UnknownBound, match=f"A plug-in is missing: .*acme_{name}"):  # not warned about again
        fresh.get("acme.half")
