"""One HTML file with everything in it: style, script and the data, and nothing that loads or runs from elsewhere.

Names of models, modules and tokens come from strangers. They reach the page as JSON, in which no `<` is left, and the
script puts them in as text alone. Should that ever fail, the content security policy lets run and load nothing but the
style and the script written here, which it names by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path

from lipbounds.errors import InvalidInput
from lipbounds.files import write_atomically
from lipbounds.report.as_json import to_dict
from lipbounds.report.schema import ModelReport


SCRIPTS = ("map.js", "curve.js", "page.js")


def page(report: ModelReport) -> str:
    """The HTML of a report.

    Args:
        report: from `measure`.
    """
    style = _own("page.css")
    script = '\n"use strict";\n' + "".join(map(_own, SCRIPTS))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(f"{report.model}: attention report"),
        "style": style,
        "script": script,
        "data": embedded(report),
    }
    before, *rest = _own("page.html").split("{{")
    # Placeholders are found before anything is put in: what a stranger's text looks like does not matter.
    filled = [parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest)]
    return before + "".join(filled)


def embedded(report: ModelReport) -> str:
    """The JSON of a report as it may stand inside a script element: ASCII, and without `<`.

    Args:
        report: from `measure`.
    """
    text = json.dumps(to_dict(report), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(report: ModelReport, path: str | Path) -> None:
    """Write the page, whole or not at all.

    Args:
        report: from `measure`.
        path: of the file; its folder is made if missing.

    Raises:
        InvalidInput: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidInput(f"path must be a file to write, got the folder '{path}'; add a name, such as report.html.")
    write_atomically(path, page(report).encode())


def _own(name: str) -> str:
    return (files("lipbounds.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
