"""A report survives JSON, and reaches the page as inert text with the same numbers."""

from __future__ import annotations

import base64
import dataclasses as dc
import hashlib
import json
import re
from pathlib import Path

import pytest

from lipbounds.errors import InvalidInput
from lipbounds.report import from_json, to_json, write_page, write_report
from lipbounds.report.as_json import to_dict
from lipbounds.report.page import embedded, page
from verify.unit.reported import HOSTILE, LABELS, Elements, tiny_input, tiny_model, tiny_report


def test_json_comes_back_whole() -> None:
    assert from_json(to_json(tiny_report())) == tiny_report()


def test_infinity_comes_back_from_json() -> None:
    report = tiny_report()
    run = report.inputs[0]
    number = dc.replace(run.layers[0].balls[0], value=float("inf"))
    changed = dc.replace(report, inputs=(dc.replace(run, layers=(dc.replace(run.layers[0], balls=(number,)),)),))
    text = to_json(changed)
    json.loads(text, parse_constant=pytest.fail)
    assert from_json(text) == changed


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 99}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"schema_version|written by to_json"):
        from_json(text)


def test_the_page_holds_the_numbers_of_the_json_file() -> None:
    report = tiny_report()
    assert json.loads(Elements(page(report)).texts["data"]) == json.loads(to_json(report))
    assert to_dict(report)["inputs"][0]["layers"][0]["bound"]["shown"] in to_json(report)


def test_names_of_strangers_are_inert() -> None:
    text = page(tiny_report())
    assert HOSTILE not in text
    assert not set("<>&") & set(embedded(tiny_report()))  # nothing in it can end or open an element, or a comment
    elements = Elements(text)
    assert [tag for tag, _ in elements.found if tag in ("script", "img", "style")] == ["style", "script", "script"]
    assert json.loads(elements.texts["data"])["model"] == HOSTILE
    assert elements.texts["title"].startswith(HOSTILE)
    assert json.loads(elements.texts["data"])["inputs"][0]["layers"][0]["queries"] == list(LABELS)


def test_nothing_but_the_own_style_and_script_may_run_or_load() -> None:
    elements = Elements(page(tiny_report()))
    (policy,) = [given["content"] for tag, given in elements.found if given.get("http-equiv")]
    assert policy is not None
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(elements.texts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not [given for _, given in elements.found if {"src", "href"} & given.keys()]
    assert set(re.findall(r"https?://[^\"' ]*", page(tiny_report()))) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page(tiny_report())


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "report.html"

    def interrupted(what: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tiny_model(), tiny_input(), path, progress=interrupted)
    assert not path.exists()
    write_page(tiny_report(), path)
    assert path.read_text(encoding="utf-8") == page(tiny_report())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_folder_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="got the folder"):
        write_page(tiny_report(), tmp_path)
