"""What `import lipbounds` alone offers: one list of names, and every dotted name that the pages use."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lipbounds
from lipbounds.registry import registry


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOTTED = re.compile(r"(?<![\w./-])lipbounds(?:\.[A-Za-z_]\w*)+")
NO_NAMES = {"lipbounds.bounds.acme.half", "lipbounds.bounds.NAME"}  # of examples
FROM_A_BARE_IMPORT = """
import sys
import lipbounds
assert "torch" not in sys.modules, "import lipbounds must not wait for torch"
for name in sys.argv[1:]:
    try:
        eval(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def dotted_names() -> set[str]:
    return {name for page in PAGES for name in DOTTED.findall(page.read_text(encoding="utf-8"))}


def test_every_dotted_name_of_the_pages_is_there_after_a_bare_import() -> None:
    names, missing = (
        dotted_names() - NO_NAMES,
        {"lipbounds.captured", "lipbounds.ops.nothing", "lipbounds.bounds.sharpp"},
    )
    assert len(names) > 30
    command = [sys.executable, "-c", FROM_A_BARE_IMPORT, *sorted(names | missing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert wrong.keys() >= missing  # a name that is not there is found
    assert [wrong[name] for name in wrong.keys() - missing] == []


def test_all_dir_and_help_list_the_same_names() -> None:
    assert set(dir(lipbounds)) == set(lipbounds.__all__)
    text = pydoc.plain(pydoc.render_doc(lipbounds)).partition("PACKAGE CONTENTS")[0]
    listed = set(re.findall(r"\w+", text))
    assert set(lipbounds.__all__) - {"__version__"} <= listed
    for name in lipbounds.__all__:
        assert getattr(lipbounds, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(lipbounds.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(lipbounds.__all__) - {"__version__"}


@pytest.mark.parametrize(
    ("name", "function"), [("capture", "capture"), ("certify", "certify"), ("report", "write_report")]
)
def test_a_module_that_is_called_is_its_function(name: str, function: str) -> None:
    module = getattr(lipbounds, name)
    target = getattr(module, function)
    assert inspect.ismodule(module)
    assert inspect.signature(module) == inspect.signature(target)


def test_capture_is_called_and_imported() -> None:
    from lipbounds.capture import capture

    model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 8)
    assert lipbounds.capture.capture is capture  # pyright: ignore[reportFunctionMemberAccess]
    (called,), (imported,) = lipbounds.capture(model, x, x, x), capture(model, x, x, x)
    assert torch.equal(called.attention.x, imported.attention.x)


def test_every_registered_bound_is_an_attribute() -> None:
    for spec in registry:
        found = lipbounds.bounds
        for part in spec.name.split("."):
            assert spec.status == "refuted" or part in dir(found), spec.name
            found = getattr(found, part)
        assert found is spec or found.registered is spec, spec.name


def test_a_module_with_the_name_of_a_bound_is_that_bound() -> None:
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 8)
    block = lipbounds.capture(model, x, x, x)[0].attention
    sharp = lipbounds.bounds.sharp
    assert torch.equal(sharp(block).value, lipbounds.get("sharp")(block).value)  # pyright: ignore
    assert sharp.claim == lipbounds.get("sharp").claim  # pyright: ignore
    assert repr(sharp) == repr(lipbounds.get("sharp"))


def test_a_misspelt_bound_suggests_its_name() -> None:
    with pytest.raises(AttributeError, match=r"did you mean \['yudin2025\.biased'"):
        _ = lipbounds.bounds.yudin2025.biasd  # pyright: ignore
