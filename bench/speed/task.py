"""Time and peak memory of every bound and estimator beside one forward pass of the same block, against its sizes.

The blocks are random, in the shapes that the axes name. Each size of each method is an answer of its own, so that a
killed run goes on; the question holds a hash of the code, because a time says nothing about other code.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import itertools
import platform
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from bench.engine.answers import Answer, Answers
from bench.engine.evaluate import TimeLimitReached, limited
from bench.engine.machine import ROOT, cpu_name
from bench.speed.plan import AXES, JASMIN_LIMIT, LONG, LONGEST, SEED, TARGETS, Profile, Target
from bench.speed.timing import Make, peak_memory, side_by_side
from bench.speed.training_steps import measured as training_step
from bench.workloads.radii import radii
from lipbounds import registry
from lipbounds.kernels.streaming import streaming_g1, streaming_map_norm
from lipbounds.ops.softmax import g_upper_from_logits
from lipbounds.targets.weight_norms import keep_weight_norms


VERSION = 1  # of what is measured here
STREAMED: dict[str, Callable[[torch.Tensor, torch.Tensor, float], Any]] = {
    "g_1 of the stored map": lambda queries, keys, scale: g_upper_from_logits(
        scale * queries.double() @ keys.double().mT
    ),
    "streaming_g1": streaming_g1,
    "streaming_map_norm, one pass": lambda queries, keys, scale: streaming_map_norm(queries, keys, scale, passes=1),
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
    targets = _targets(answers, profile, here, device, force, advance) if profile.targets else []
    methods = [spec.name for spec in registry.select() if profile.methods is None or spec.name in profile.methods]
    rows: list[dict[str, Any]] = []
    stopped: list[dict[str, Any]] = []
    for (axis, count), method in itertools.product(profile.axes.items(), methods):
        advance(f"{method} against {axis}")
        limit = profile.patience if axis == "tokens" and method in LONG else profile.limit
        base, values = AXES[axis]
        for value in values[:count]:
            target = Target(title="", method=method, shape=dc.replace(base, **{axis: value}))
            answer = answers.ask(question(target, here), lambda t=target: measured(t, profile, device), force=force)
            rows.append({"method": method, "axis": axis, "value": value, "answer": answer})
            if "error" in answer or answer["cost"][1] > limit:
                if value != values[:count][-1]:
                    stopped.append(rows[-1])
                break
    streamed = []
    for tokens in (*profile.streaming, *(LONGEST if device.type == "cuda" else ())):
        advance(f"{tokens} tokens, no map stored")
        for name in STREAMED:
            asked = {"task": "speed", "version": VERSION, "what": "streaming", "method": name, "tokens": tokens, **here}
            answer = answers.ask(asked, lambda f=name, n=tokens: _streamed(f, n, profile, device), force=force)
            streamed.append({"method": name, "tokens": tokens, "answer": answer})
    limits = {"limit": profile.limit, "patience": profile.patience}
    return {"place": here, "rows": rows, "stopped": stopped, "targets": targets, "streamed": streamed, **limits}


def _targets(
    answers: Answers, profile: Profile, here: Answer, device: torch.device, force: bool, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The blocks of ViT-B/16, and a training step of it."""
    found = []
    longer = dc.replace(profile, enough=profile.targets)
    for target in TARGETS:
        advance(f"ViT-B/16: {target.method}")
        answer = answers.ask(question(target, here), lambda t=target: measured(t, longer, device), force=force)
        found.append({**dc.asdict(target), "answer": answer})
    advance("ViT-B/16: training step with JaSMin")
    asked = {"task": "speed", "version": VERSION, "what": "jasmin", **here}
    answer = answers.ask(
        asked,
        lambda: training_step("vit-b-16", repeats=longer.repeats, enough=2 * longer.enough, device=device),
        force=force,
    )
    title = "training step with JaSMin, in units of one without"
    return [*found, {"title": title, "method": "jasmin", "limit": JASMIN_LIMIT, "answer": answer}]


def place(device: torch.device) -> Answer:
    """What times depend on besides what is called.

    Args:
        device: where it is called.
    """
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "lipbounds").rglob("*.py"), ROOT / "bench/speed/timing.py"]):
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


def question(target: Target, here: Answer) -> Answer:
    """Everything that a time depends on.

    Args:
        target: method, options and shape of the block.
        here: what `place` returned.
    """
    asked = {"task": "speed", "version": VERSION, "what": "call", "method": target.method, "options": target.options}
    return asked | {"shape": dc.asdict(target.shape), "kept": target.kept, **here}


@torch.no_grad()
def measured(target: Target, profile: Profile, device: torch.device) -> Answer:
    """Time and memory of a method at a block and of the forward pass of that block.

    Args:
        target: method, options and shape of the block.
        profile: how often.
        device: where.
    """
    spec, block = registry.get(target.method), target.shape.block(device)
    single = block if target.shape.batch == 1 else block.at(block.x[0])
    (radius, *_) = radii(single, spec.claim.scope)

    def make() -> Callable[[], Any]:
        fresh = block.replace()  # without the cached logits of the call before; its validation is not timed
        return lambda: spec(fresh, None if radius is None else radius.value, **target.options)

    def forward() -> Callable[[], Any]:
        function = block.function()
        return lambda: function(block.moving_input)

    try:
        with limited(profile.stop), keep_weight_norms() if target.kept else nullcontext():
            return _both(make, forward, profile, device)
    except TimeLimitReached:
        return {"error": f"no result within {profile.stop:g} s"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _both(make: Make, baseline: Make, profile: Profile, device: torch.device) -> Answer:
    """Times, and then memory, which takes one more call unless that would take long."""
    answer = side_by_side(make, baseline, repeats=profile.repeats, enough=profile.enough, device=device)
    if answer["cost"][1] > profile.patience:
        return answer
    return answer | {"megabytes": peak_memory(make, device), "baseline_megabytes": peak_memory(baseline, device)}


@torch.no_grad()
def _streamed(name: str, tokens: int, profile: Profile, device: torch.device) -> Answer:
    """A summary of a map of one head of width 64 beside fused attention with the same queries and keys."""
    generator = torch.Generator().manual_seed(SEED)
    queries, keys, values = (torch.randn(1, tokens, 64, generator=generator).to(device) for _ in range(3))
    function = STREAMED[name]
    return _both(
        lambda: lambda: function(queries, keys, 0.125),
        lambda: lambda: torch.nn.functional.scaled_dot_product_attention(queries, keys, values),
        profile,
        device,
    )
