"""`python .ci/smoke.py DIST`: the wheel in DIST, in a fresh environment: without extras, with each, and for a stranger.

One environment serves all steps, from the smallest to the largest, because torch takes a minute to install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "my_bounds"

BASE = """
import importlib.util, torch, lipbounds
from lipbounds.capture import capture
assert lipbounds.__file__.startswith(PREFIX), lipbounds.__file__
for name in ("typer", "rich", "hypothesis", "pytest", "transformers", "sklearn", "ray", "bench", "verify"):
    assert importlib.util.find_spec(name) is None, f"{name} came in without an extra"
model = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval().requires_grad_(False)
block = capture(model, torch.randn(1, 4, 8))[0].attention
bounds = lipbounds.select(block=block, kind="proved", scope="point")
assert len(bounds) > 5, bounds
truth = float(lipbounds.get("exact")(block).value)
for bound in bounds:
    if bound.claim.norm == "l2":
        assert float(bound(block).value) >= truth * (1 - 1e-6), bound.name
"""
LOADING = """
import torch
from lipbounds.models.loading import load_model
for name in ("digits-vit", "lipschitz-vit"):
    load_model(name).module(torch.zeros(1, 1, 8, 8))
text = load_model("minilm")
text.module(**text.tokenizer("a cat", return_tensors="pt"))
"""
BENCH = """
import matplotlib, pyautoattack, scipy, tabulate
"""


def main() -> None:
    """Run all steps; the first that fails ends the program."""
    dist = Path(sys.argv[1]).resolve()
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "fresh", with_pip=True)
        fresh = Fresh(folder, wheel)
        fresh.install("")
        fresh.python(f"PREFIX = {str(folder)!r}\n{BASE}")
        fresh.command(1, "bounds", says="pip install -e '.[cli]'")
        fresh.install("cli")
        fresh.command(0, "bounds", "--json", says="yudin2025.biased")
        fresh.command(0, "diff", *2 * [str(ROOT / "results" / "tightness.json")], says="0 worse")
        fresh.command(2, "verify", "sharp", says="pip install -e '.[verify]'")
        fresh.command(2, "train-digits", says="pip install -e '.[models]'")
        fresh.command(2, "bench", says="from a copy of the repository")
        fresh.install("models")
        fresh.python(LOADING)
        fresh.command(2, "report", "digits-vit", "--ray", says="pip install -e '.[ray]'")
        fresh.install("verify")
        fresh.pip("--no-deps", str(EXAMPLE))
        fresh.run("-m", "pytest", "-q", "-c", str(EXAMPLE / "pyproject.toml"), str(EXAMPLE / "tests"))
        fresh.install("bench")
        fresh.python(BENCH)
        fresh.install("ray")
        fresh.command(
            0, "report", "digits-vit", "--layers", "0", "--ray", "local", says="Open report.html in a browser"
        )


def check_contents(wheel: Path, sdist: Path) -> None:
    """What must be shipped is in both, and nothing of the benchmark is in the wheel."""
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    with tarfile.open(sdist) as opened:
        sources = {name.partition("/")[2] for name in opened.getnames()}
    needed = {"lipbounds/py.typed", "lipbounds/cli/app.py"}
    needed |= {f"lipbounds/models/weights/{name}_vit.safetensors" for name in ("digits", "lipschitz")}
    for found in (set(names), sources):
        assert needed <= found, needed - found
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= sources
    tops = {name.split("/")[0] for name in names}
    assert all(top == "lipbounds" or top.endswith(".dist-info") for top in tops), tops


class Fresh:
    """An environment of its own, outside of the repository.

    Args:
        folder: that holds it.
        wheel: what is installed.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.wheel = folder, wheel
        self.bin = folder / "fresh" / ("Scripts" if os.name == "nt" else "bin")
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment |= {"HF_HUB_OFFLINE": "1", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}

    def install(self, extra: str) -> None:
        """The wheel, with an extra."""
        print(f"-- {self.wheel.name} {extra and f'[{extra}]'}", flush=True)
        self.pip(f"{self.wheel}[{extra}]" if extra else str(self.wheel))

    def pip(self, *arguments: str) -> None:
        """`pip install`; compiling all of torch takes longer than compiling what is imported."""
        self.run("-m", "pip", "install", "-q", "--no-compile", *arguments)

    def python(self, source: str) -> None:
        """Run a piece of Python, warnings shown."""
        self.run("-c", source)

    def run(self, *arguments: str) -> None:
        """Run its Python."""
        subprocess.run([self.bin / "python", *arguments], cwd=self.folder, env=self.environment, check=True)

    def command(self, status: int, *arguments: str, says: str) -> None:
        """Run the console script, and check its exit status and what it says, with no traceback."""
        command = [self.bin / "lipbounds", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        told = done.stdout + done.stderr
        assert done.returncode == status, f"lipbounds {arguments}: {done.returncode}\n{told}"
        assert says in told, told
        assert "Traceback" not in told, told


if __name__ == "__main__":
    main()
