"""Time and peak memory of every bound and estimator beside one forward pass of the same block, against its sizes.

The blocks are random, in the shapes that the axes name. Each size of each method is an answer of its own, so that a
killed run goes on; the question holds a hash of the code, because a time says nothing about other code.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.certified_data import Answer, Answers
from bench.machine import ROOT, cpu_name
from bench.radii import radii
from bench.timing import peak_memory, side_by_side
from lipbounds import registry
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


VERSION = 1  # of what is measured here
SEED = 0
# Values of an axis and the shape in which it is varied.
Axis = tuple[str, tuple[Any, ...]]


@dc.dataclass(frozen=True, kw_only=True)
class Shape:
    """A random attention block.

    Args:
        tokens: n.
        width: D.
        heads: H, of width D/H each.
        batch: number of inputs.
        dtype: of all tensors.
        biases: whether queries, keys and values have them.
    """

    tokens: int = 64
    width: int = 64
    heads: int = 2
    batch: int = 1
    dtype: str = "float32"
    biases: bool = False

    def block(self, device: torch.device) -> Attention:
        """Gaussian tokens of unit entries and weights that keep that size, the same every time.

        Args:
            device: where its tensors are.
        """
        generator = torch.Generator().manual_seed(SEED)
        inner = self.width // self.heads

        def draw(*size: int, scale: float) -> torch.Tensor:
            drawn = scale * torch.randn(size, generator=generator)
            return drawn.to(device, getattr(torch, self.dtype))

        names = ("w_q", "w_k", "w_v")
        weights = {name: draw(self.heads, self.width, inner, scale=self.width**-0.5) for name in names}
        if self.biases:
            weights |= {f"b_{name[-1]}": draw(self.heads, inner, scale=0.1) for name in names}
        leading = (self.batch,) if self.batch > 1 else ()
        return Attention(
            x=draw(*leading, self.tokens, self.width, scale=1.0),
            w_o=draw(self.heads, inner, self.width, scale=self.width**-0.5),
            **weights,
        )


VIT = Shape(tokens=197, width=768, heads=12, biases=True)
AXES: dict[str, tuple[Shape, tuple[Any, ...]]] = {
    "tokens": (Shape(), (64, 128, 256, 512, 1024, 2048, 4096)),
    "width": (Shape(heads=4), (64, 128, 256, 512, 1024)),
    "heads": (Shape(width=256), (1, 2, 4, 8, 16)),
    "batch": (Shape(), (1, 2, 4, 8, 16)),
    "dtype": (Shape(tokens=256), ("float32", "float64", "bfloat16")),
}


@dc.dataclass(frozen=True, kw_only=True)
class Target:
    """What a method may cost on a block of ViT-B/16.

    Args:
        title: what is measured, in words.
        method: name of the bound.
        limit: largest ratio that meets the target.
        options: of the bound.
    """

    title: str
    method: str
    limit: float
    options: dict[str, Any] = dc.field(default_factory=dict)


TARGETS = (
    Target(title="Theorem 3 with biases", method="yudin2025.biased", limit=1.3),
    Target(title="sharp, fast form", method="sharp_fast", limit=3.0),
    Target(title="Theorem 3 on a ball", method="yudin2025_ball.biased", limit=5.0),
    Target(title="sharp on a ball", method="sharp_ball", limit=5.0),
    Target(
        title="Lanczos certificate, 60 steps",
        method="lanczos_certificate",
        limit=150.0,
        options={"steps": 60, "delta": 1e-9},
    ),
)
JASMIN_LIMIT = 1.1


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is measured.

    Args:
        axes: how many values of each axis.
        methods: names; None for all.
        limit: a method that took longer than that, in seconds, is not measured at the next value of the axis.
        enough: seconds spent on the repeats of one size.
        repeats: of each size, at most.
        targets: whether the block of ViT-B/16 and a training step are measured.
    """

    axes: dict[str, int]
    methods: tuple[str, ...] | None
    limit: float
    enough: float
    repeats: int
    targets: bool


PROFILES = {
    "standard": Profile(
        axes={"tokens": 7, "width": 5, "heads": 5, "batch": 5, "dtype": 3},
        methods=None,
        limit=0.4,
        enough=0.4,
        repeats=7,
        targets=True,
    ),
    "quick": Profile(
        axes={"tokens": 3, "width": 2, "heads": 2, "batch": 2, "dtype": 2},
        methods=("yudin2025.biased", "centred.products", "sharp_fast", "lanczos"),
        limit=0.2,
        enough=0.2,
        repeats=5,
        targets=False,
    ),
}


def run(
    answers: Answers,
    profile: Profile,
    *,
    device: torch.device,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """All the data of the page: from the file of answers, or measured now.

    Args:
        answers: the file.
        profile: how much is measured.
        device: where.
        force: measure again what is in the file.
        advance: called before each method with its name.
    """
    here = place(device)
    methods = [spec for spec in registry.select() if profile.methods is None or spec.name in profile.methods]
    rows: list[dict[str, Any]] = []
    stopped: list[dict[str, Any]] = []
    for spec in methods:
        advance(spec.name)
        for axis, count in profile.axes.items():
            base, values = AXES[axis]
            for value in values[:count]:
                shape = dc.replace(base, **{axis: value})
                answer = answers.ask(
                    question(spec, shape, here, {}),
                    lambda s=spec, b=shape, m=axis == "tokens": measured(s, b, profile, device, memory=m),
                    force=force,
                )
                rows.append({"method": spec.name, "axis": axis, "value": value, "answer": answer})
                if "error" in answer or answer["seconds"][1] > profile.limit:
                    if value != values[:count][-1]:
                        stopped.append(rows[-1])
                    break
    targets = []
    if profile.targets:
        for target in TARGETS:
            advance(f"ViT-B/16: {target.method}")
            spec = registry.get(target.method)
            answer = answers.ask(
                question(spec, VIT, here, target.options),
                lambda s=spec, o=target.options: measured(s, VIT, profile, device, options=o),
                force=force,
            )
            targets.append({**dc.asdict(target), "answer": answer})
        advance("ViT-B/16: training step with JaSMin")
        asked = {"task": "speed", "version": VERSION, "what": "jasmin", **here}
        answer = answers.ask(asked, lambda: _jasmin(profile, device), force=force)
        title = "training step with JaSMin, in units of one without"
        targets.append({"title": title, "method": "jasmin", "limit": JASMIN_LIMIT, "options": {}, "answer": answer})
    return {"place": here, "rows": rows, "stopped": stopped, "targets": targets, "limit": profile.limit}


def place(device: torch.device) -> Answer:
    """What times depend on besides what is called.

    Args:
        device: where it is called.
    """
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "lipbounds").rglob("*.py"), ROOT / "bench/timing.py"]):
        digest.update(path.read_bytes())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "code": digest.hexdigest()[:16],
    }


def question(spec: BoundSpec, shape: Shape, here: Answer, options: dict[str, Any]) -> Answer:
    """Everything that a time depends on.

    Args:
        spec: the bound or estimator.
        shape: of the block.
        here: what `place` returned.
        options: of the bound.
    """
    asked = {"task": "speed", "version": VERSION, "what": "call", "method": spec.name, "options": options}
    return asked | {"shape": dc.asdict(shape), **here}


@torch.no_grad()
def measured(
    spec: BoundSpec,
    shape: Shape,
    profile: Profile,
    device: torch.device,
    *,
    options: dict[str, Any] | None = None,
    memory: bool = False,
) -> Answer:
    """Times of a method at a block and of the forward pass of that block, and what memory they take.

    Args:
        spec: the bound or estimator.
        shape: of the block.
        profile: how often.
        device: where.
        options: of the bound.
        memory: whether memory is measured, which takes one more call.
    """
    block = shape.block(device)
    single = block if shape.batch == 1 else block.at(block.x[0])
    (radius, *_) = radii(single, spec.claim.scope)

    def make() -> Callable[[], Any]:
        fresh = block.replace()  # without the cached logits of the call before; its validation is not timed
        return lambda: spec(fresh, None if radius is None else radius.value, **(options or {}))

    def forward() -> Callable[[], Any]:
        function = block.function()
        return lambda: function(block.moving_input)

    try:
        answer = side_by_side(make, forward, repeats=profile.repeats, enough=profile.enough, device=device)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if memory:
        answer |= {"megabytes": peak_memory(make, device), "baseline_megabytes": peak_memory(forward, device)}
    return answer


def _jasmin(profile: Profile, device: torch.device) -> Answer:
    """A training step of ViT-B/16 with the penalty and without, on one image."""
    from bench.architectures import ARCHITECTURES
    from lipbounds.jasmin import JaSMin

    found = ARCHITECTURES["vit-b-16"]
    model, image = found.model().train().to(device), found.input(0).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def plain() -> None:
        optimizer.zero_grad()
        model(image).last_hidden_state.square().mean().backward()
        optimizer.step()

    def penalised() -> None:
        optimizer.zero_grad()
        with JaSMin(model) as penalty:
            loss = model(image).last_hidden_state.square().mean() + 1e-3 * penalty.penalty()
            loss.backward()
        optimizer.step()

    return side_by_side(
        lambda: penalised, lambda: plain, repeats=profile.repeats, enough=30 * profile.enough, device=device
    )


def exponent(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Growth exponent of a time: the slope of a straight line through the last points, in logarithms.

    Args:
        points: sizes and times, in order; the last four at most are used.

    Returns:
        the slope, the smallest and the largest slope between neighbours, and the sizes it was fitted over; None for
        fewer than three points.
    """
    points = points[-4:]
    if len(points) < 3:
        return None
    sizes, times = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    centred = sizes - sizes.mean()
    slopes = times.diff() / sizes.diff()
    return {
        "slope": float((centred * times).sum() / centred.square().sum()),
        "between": [float(slopes.min()), float(slopes.max())],
        "sizes": [points[0][0], points[-1][0]],
    }
