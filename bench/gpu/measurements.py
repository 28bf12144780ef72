"""The measurements of `python -m bench gpu`, most valuable first: each gives one result, or says why it cannot."""

from __future__ import annotations

import dataclasses as dc
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.gpu import robust, smollm2
from bench.robustness.settings import SETTINGS
from bench.speed.plan import SEED, VIT, Shape
from bench.speed.timing import peak_memory, side_by_side
from bench.speed.training_steps import measured as training_step
from bench.workloads.models import architectures, zoo
from lipbounds import Attention, registry
from lipbounds.kernels.streaming import streaming_g1, streaming_map_norm
from lipbounds.kernels.streaming_sharp import streaming_sharp_cheap
from lipbounds.targets.weight_norms import keep_weight_norms


Result = dict[str, Any]


class Skipped(Exception):
    """A measurement that this machine cannot make; the reason is for the page."""


@dc.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One result.

    Args:
        part: of the page.
        name: unique in its part.
        work: measures.
        limit: seconds after which it is given up.
    """

    part: str
    name: str
    work: Callable[[], Result]
    limit: float = 180.0


def measurements(device: torch.device, *, quick: bool, data: Path | None = None) -> list[Measurement]:
    """All of them in the order in which they are made.

    Args:
        device: where.
        quick: small sizes, which show that everything runs and nothing else.
        data: folder of Fashion-MNIST; None for the digits of scikit-learn.
    """
    parts = (_checks, _speed, _long_maps, _tightness)
    return [*(each for part in parts for each in part(device, quick)), *_robust(device, quick, data)]


# -- checks ---------------------------------------------------------------------------------------------------------


def _checks(device: torch.device, quick: bool) -> Iterator[Measurement]:
    yield Measurement(part="checks", name="bounds are those of the CPU", work=lambda: _as_on_the_cpu(device, quick))
    count = 3 if quick else 300
    yield Measurement(part="checks", name="the certificate holds", work=lambda: _coverage(device, count))
    yield Measurement(part="checks", name="the Triton kernel is the reference", work=lambda: _kernel(device))


def _as_on_the_cpu(device: torch.device, quick: bool) -> Result:
    """The largest relative difference of each proved bound, in float64, between the device and the CPU."""
    block = Shape(tokens=12, width=16, dtype="float64", biases=True).block(torch.device("cpu"))
    worst = {}
    for spec in registry.select(kind="proved", block=block):
        if quick and (spec.claim.scope != "point" or spec.role != "bound"):
            continue
        radius = 0.1 if spec.needs_radius else None
        here, there = spec(block, radius).value, spec(block.to(device), radius).value.cpu()
        worst[spec.name] = abs(there / here - 1).max().item()
    name = max(worst, key=lambda each: worst[each])
    return {"bounds": len(worst), "largest difference": worst[name], "of": name, "passed": worst[name] < 1e-9}


def _coverage(device: torch.device, count: int) -> Result:
    """How often the certificate with delta = 0.01 is below the exact norm: at most that share, or the code is wrong."""
    exact, certificate = registry.get("exact"), registry.get("lanczos_certificate")
    block, missed = Shape(tokens=6, width=8, dtype="float64", biases=True).block(device), 0
    for seed in range(count):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
        here = block.at(x)
        missed += bool(certificate(here, delta=0.01, steps=20, seed=seed).value < exact(here).value * (1 - 1e-9))
    return {
        "blocks": count,
        "missed": missed,
        "delta": 0.01,
        "passed": missed <= 0.01 * count + min(3.0, 0.3 * count**0.5),
    }


def _kernel(device: torch.device) -> Result:
    """The largest difference of the scores of JaSMin between the kernel and torch, by the bound on their rounding."""
    kernel = _triton(device)
    from lipbounds.ops.log_g import log_g_1, log_g_ratio

    worst = 0.0
    for dtype, k in ((torch.float32, 0), (torch.float32, 10), (torch.bfloat16, 0), (torch.bfloat16, 10)):
        generator = torch.Generator().manual_seed(SEED)
        queries, keys = (torch.randn(2, 4, 500, 64, generator=generator).to(device, dtype) for _ in range(2))
        found = kernel.jasmin_scores(queries, keys, 0.125, k, causal=True)[..., 1:]
        logits = 0.125 * queries.double() @ keys.double().mT
        future = torch.ones(500, 500, dtype=torch.bool, device=device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)[..., 1:, :]
        truth = log_g_ratio(logits, k) if k else log_g_1(logits)
        allowed = 8 * kernel.logit_error(queries, keys, 0.125).max() + 40 * 2.0**-23 * (1 + truth.abs().max())
        worst = max(worst, ((found - truth).abs().max() / allowed).item())
    return {"largest difference by what rounding allows": worst, "passed": worst <= 1}


def _triton(device: torch.device) -> Any:
    if device.type != "cuda":
        raise Skipped(f"the kernel needs CUDA, got {device.type}; tests run it through Triton's interpreter")
    if importlib.util.find_spec("triton") is None:
        raise Skipped("triton is not installed")
    from lipbounds.kernels import triton_jasmin

    return triton_jasmin


# -- speed ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "ViT-B/16 (n = 197, D = 768, 12 heads)": VIT,
    "Llama-like (n = 4096, D = 4096, 32 heads)": Shape(tokens=4096, width=4096, heads=32),
    "GPT-2 (n = 1024, D = 768, 12 heads)": Shape(tokens=1024, width=768, heads=12, biases=True),
}
SMALL = {"small (n = 32, D = 64, 2 heads)": Shape(tokens=32, width=64, heads=2, biases=True)}
METHODS = ("yudin2025.biased", "sharp_cheap", "yudin2025_ball.biased")


def _speed(device: torch.device, quick: bool) -> Iterator[Measurement]:
    for (title, base), dtype in itertools.product((SMALL if quick else SHAPES).items(), ("bfloat16", "float32")):
        shape = dc.replace(base, dtype=dtype)
        for method in METHODS:
            yield Measurement(
                part="speed",
                name=f"{method}, {title}, {dtype}",
                work=lambda m=method, s=shape: _timed(m, s, device, quick),
            )

    model = "digits-vit" if quick else "vit-b-16"
    yield Measurement(
        part="speed",
        name=f"training step of {model} with JaSMin, in units of one without",
        work=lambda: training_step(model, repeats=1 if quick else 7, enough=0.0 if quick else 4.0, device=device),
    )


@torch.no_grad()
def _timed(method: str, shape: Shape, device: torch.device, quick: bool) -> Result:
    spec, block = registry.get(method), shape.block(device)
    radius = 0.1 if spec.needs_radius else None
    function = block.function()

    def make() -> Callable[[], Any]:
        fresh = block.replace()  # without what the call before kept
        return lambda: spec(fresh, radius)

    def forward() -> Callable[[], Any]:
        return lambda: function(block.moving_input)

    with keep_weight_norms() if not spec.needs_radius else nullcontext():
        return _costs(make, forward, device, quick)


def _costs(make: Any, baseline: Any, device: torch.device, quick: bool) -> Result:
    found = side_by_side(make, baseline, repeats=1 if quick else 7, enough=0.0 if quick else 2.0, device=device)
    return found | {"megabytes": peak_memory(make, device), "baseline_megabytes": peak_memory(baseline, device)}


# -- long maps ------------------------------------------------------------------------------------------------------


def _long_maps(device: torch.device, quick: bool) -> Iterator[Measurement]:
    heads, width = (2, 16) if quick else (16, 64)
    for tokens in (64,) if quick else (16_384, 32_768, 65_536, 131_072):
        names = ["jasmin_scores (Triton)", "streaming_g1", "streaming_map_norm, one pass"]
        if tokens in (64, 16_384, 65_536):  # 131 072 would take a minute
            names.append("streaming_sharp_cheap")
        for name in names:
            yield Measurement(
                part="long maps",
                name=f"{name}, n = {tokens}, {heads} heads of {width}, bfloat16",
                work=lambda f=name, n=tokens: _long(f, n, heads, width, device, quick),
            )


@torch.no_grad()
def _long(name: str, tokens: int, heads: int, width: int, device: torch.device, quick: bool) -> Result:
    generator = torch.Generator().manual_seed(SEED)
    queries, keys, values = (
        torch.randn(1, heads, tokens, width, generator=generator).to(device, torch.bfloat16) for _ in range(3)
    )
    scale = width**-0.5
    if name.startswith("jasmin"):
        kernel = _triton(device)
        call = lambda: kernel.jasmin_scores(queries, keys, scale)  # noqa: E731
    elif name.startswith("streaming_sharp"):
        block = Shape(tokens=tokens, width=heads * width, heads=heads, dtype="bfloat16").block(device)
        call = lambda: streaming_sharp_cheap(block.replace())  # noqa: E731
    elif name.startswith("streaming_g1"):
        call = lambda: streaming_g1(queries, keys, scale)  # noqa: E731
    else:
        call = lambda: streaming_map_norm(queries, keys, scale, passes=1)  # noqa: E731
    attend = torch.nn.functional.scaled_dot_product_attention
    found = _costs(lambda: call, lambda: lambda: attend(queries, keys, values), device, quick)
    # One product of n x d with d x n, of which fused attention makes two; second moments are 2 d times as many numbers.
    per_entry = 2 * width * width if name.startswith("streaming_sharp") else width
    return found | {"teraflops": 2 * heads * tokens**2 * per_entry / found["cost"][1] / 1e12}


# -- tightness ------------------------------------------------------------------------------------------------------


def _tightness(device: torch.device, quick: bool) -> Iterator[Measurement]:
    for model in {model.name: model for model in [*architectures(), *zoo()]}.values():
        if quick and model.name != "torch-encoder":
            continue
        yield Measurement(
            part="tightness",
            name=model.name,
            work=lambda m=model: _ratios((c.block for c in m.cases(1)), device, quick),
        )
    yield Measurement(
        part="tightness", name="smollm2-135m, trained", work=lambda: _ratios(smollm2.trained(), device, quick)
    )
    layers, width = (2, 36) if quick else (30, 576)
    yield Measurement(
        part="tightness",
        name=f"shape of smollm2-135m, random start, {layers} layers of width {width}",
        work=lambda: _ratios(smollm2.at_random(layers=layers, width=width), device, quick),
    )


@torch.no_grad()
def _ratios(blocks: Iterable[Attention], device: torch.device, quick: bool) -> Result:
    """Each bound by the lower bound of Lanczos in float64, at all blocks (quick: one) of a model at its first input."""
    try:
        found = list(itertools.islice(blocks, 1 if quick else None))
    except ImportError as error:
        raise Skipped(f"{error}; install what the model needs") from error
    ratios: dict[str, list[float]] = {}
    for one in found:
        block = one.double.to(device)
        lower = registry.get("lanczos")(block).value
        for name in ("lanczos_certificate", "sharp_cheap", "yudin2025.biased"):
            spec = registry.get(name)
            if not spec.missing_features(block):
                ratios.setdefault(name, []).append((spec(block).value / lower).max().item())
    return {"blocks": len(found), "ratios": ratios}


# -- robust training ------------------------------------------------------------------------------------------------


def _robust(device: torch.device, quick: bool, folder: Path | None) -> Iterator[Measurement]:
    """Seed by seed, so that a run that is stopped early leaves whole seeds."""
    size, loaded = robust.QUICK if quick else robust.Size(), functools.cache(robust.load)
    source = "digits" if folder is None else "Fashion-MNIST"
    for seed, name in itertools.product(size.seeds, size.settings):
        yield Measurement(
            part="robust training",
            name=f"{SETTINGS[name].title}, {source}, seed {seed}",
            work=lambda s=seed, n=name: _trained(n, s, loaded(folder), size, device),
        )


def _trained(name: str, seed: int, data: robust.Data, size: robust.Size, device: torch.device) -> Result:
    try:
        return robust.measured(name, seed, data, size, device)
    except ImportError as error:
        raise Skipped(f"{error}; AutoAttack comes with the extra bench") from error
