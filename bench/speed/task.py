"""Time and peak memory of every bound and estimator beside one forward pass of the same block, against its sizes.

The blocks are random, in the shapes that the axes name. Each size of each method is an answer of its own, so that a
killed run goes on; the question holds a hash of the code, because a time says nothing about other code.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import itertools
import platform
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from bench.engine.answers import Answered, Shown
from bench.engine.evaluate import TimeLimitReached, limited
from bench.engine.evaluators import CPU
from bench.engine.machine import ROOT, cpu_name
from bench.engine.store import Answer, Store
from bench.speed import pareto
from bench.speed.plan import AXES, JASMIN_LIMIT, LONG, LONGEST, SEED, TARGETS, VIT, Profile, Target
from bench.speed.timing import Make, peak_memory, side_by_side
from bench.speed.training_steps import measured as training_step
from bench.workloads.radii import radii
from lipbounds import registry
from lipbounds.kernels.streaming import streaming_g1, streaming_map_norm
from lipbounds.ops.softmax import g_upper_from_logits
from lipbounds.targets.weight_norms import keep_weight_norms


STOP = 60.0  # seconds after which a bound at a block of bench/speed/pareto.py is given up
VERSION = 1  # of what is measured here
STREAMED: dict[str, Callable[[torch.Tensor, torch.Tensor, float], Any]] = {
    "g_1 of the stored map": lambda queries, keys, scale: g_upper_from_logits(
        scale * queries.double() @ keys.double().mT
    ),
    "streaming_g1": streaming_g1,
    "streaming_map_norm, one pass": lambda queries, keys, scale: streaming_map_norm(queries, keys, scale, passes=1),
}


def run(
    answers: Store,
    profile: Profile,
    *,
    device: torch.device,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure all that is not in the file yet; returns what the page is made of.

    Args:
        answers: the file.
        profile: how much is measured.
        device: where.
        force: measure again what is in the file.
        advance: called before each method with its name.
    """
    here = place(device)
    names = [spec.name for spec in registry.select() if profile.methods is None or spec.name in profile.methods]
    lengths = (*profile.streaming, *(LONGEST if device.type == "cuda" else ()))
    asking = Asking(answers, profile, lambda: here, device, force, advance)
    return _found(asking, names, lengths, here)


def shown(found: Shown, profile: Profile) -> dict[str, Any]:
    """What page and figures are made of.

    Args:
        found: the answers of a run.
        profile: of the run.
    """
    calls = found.select(what="call")
    names = list(dict.fromkeys(row["method"] for row in calls if row["shape"]["tokens"] != VIT.tokens))
    here = {name: found.entries[0].question[name] for name in ("device", "hardware", "threads", "torch", "python")}
    lengths = tuple(dict.fromkeys(row["tokens"] for row in found.select(what="streaming")))
    return _found(Asking(found, profile, dict, CPU, False, lambda what: None), sorted(names), lengths, here)


@dc.dataclass(frozen=True)
class Asking:
    """How the numbers of a page are asked for: of a run, which measures what is missing, or of the records.

    Args:
        answers: the file, or what a page shows.
        profile: how much is measured.
        place: gives what times depend on besides what is called.
        device: where it is measured.
        force: measure again what is in the file.
        advance: called before each method with its name.
    """

    answers: Store | Answered
    profile: Profile
    place: Callable[[], Answer]
    device: torch.device
    force: bool
    advance: Callable[[str], None]

    def ask(self, question: Answer, work: Callable[[], Answer]) -> Answer:
        """The answer to a question of this task."""
        return self.answers.ask({"task": "speed", **question}, work, rest=self.rest, force=self.force)

    def rest(self) -> Answer:
        """What every answer depends on."""
        return {"version": VERSION, **self.place()}

    def points(self) -> list[pareto.Point]:
        """The bounds at blocks that are measured, or that a page shows."""
        if isinstance(self.answers, Answered):
            shown = {(row["block"], row["method"]) for row in self.answers.select(what="pareto")}
            return [each for each in pareto.points() if (each.block, each.question["method"]) in shown]
        return list(pareto.points()) if self.profile.pareto else []

    def target(self, target: Target, profile: Profile) -> Answer:
        """The same for a row of the table of targets, which may be newer than the records that a page shows."""
        if isinstance(self.answers, Answered) and not self.answers.select(**question(target)):
            return {"error": "not measured"}
        return self.call(target, profile)

    def call(self, target: Target, profile: Profile) -> Answer:
        """Time and memory of a method at a block."""
        return self.ask(question(target), lambda: measured(target, profile, self.device))


def _found(asking: Asking, names: Iterable[str], lengths: Iterable[int], here: Answer) -> dict[str, Any]:
    profile = asking.profile
    targets = _targets(asking) if profile.targets else []
    rows: list[dict[str, Any]] = []
    stopped: list[dict[str, Any]] = []
    for (axis, count), method in itertools.product(profile.axes.items(), names):
        asking.advance(f"{method} against {axis}")
        limit = profile.patience if axis == "tokens" and method in LONG else profile.limit
        base, values = AXES[axis]
        for value in values[:count]:
            target = Target(title="", method=method, shape=dc.replace(base, **{axis: value}))
            answer = asking.call(target, profile)
            rows.append({"method": method, "axis": axis, "value": value, "answer": answer})
            if "error" in answer or answer["cost"][1] > limit:
                if value != values[:count][-1]:
                    stopped.append(rows[-1])
                break
    streamed = []
    for tokens, name in itertools.product(lengths, STREAMED):
        asking.advance(f"{tokens} tokens, no map stored")
        question = {"what": "streaming", "method": name, "tokens": tokens}
        answer = asking.ask(question, lambda f=name, n=tokens: _streamed(f, n, profile, asking.device))
        streamed.append({"method": name, "tokens": tokens, "answer": answer})
    found = [{**dc.asdict(point), "answer": _point(asking, point)} for point in asking.points()]
    limits = {"limit": profile.limit, "patience": profile.patience}
    return {
        "place": here,
        "rows": rows,
        "stopped": stopped,
        "targets": targets,
        "streamed": streamed,
        "pareto": found,
        **limits,
    }


def _targets(asking: Asking) -> list[dict[str, Any]]:
    """The blocks of ViT-B/16, and a training step of it."""
    found = []
    longer = dc.replace(asking.profile, enough=asking.profile.targets)
    for target in TARGETS:
        asking.advance(f"ViT-B/16: {target.method}")
        found.append({**dc.asdict(target), "answer": asking.target(target, longer)})
    asking.advance("ViT-B/16: training step with JaSMin")
    answer = asking.ask(
        {"what": "jasmin"},
        lambda: training_step("vit-b-16", repeats=longer.repeats, enough=2 * longer.enough, device=asking.device),
    )
    title = "training step with JaSMin, in units of one without"
    return [*found, {"title": title, "method": "jasmin", "limit": JASMIN_LIMIT, "answer": answer}]


def _point(asking: Asking, point: pareto.Point) -> Answer:
    asking.advance(f"{point.block}: {point.method or 'truth'}")
    enough, stop = asking.profile.pareto, min(asking.profile.stop, STOP)
    return asking.ask(
        point.question,
        lambda: pareto.measured(point, repeats=5, enough=enough, stop=stop, device=asking.device),
    )


HERE = ("device", "hardware", "threads", "torch", "python", "code")  # what `place` says


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


def question(target: Target) -> Answer:
    """What is called; a time depends on `place` as well.

    Args:
        target: method, options and shape of the block.
    """
    asked = {"what": "call", "method": target.method, "options": target.options}
    return asked | {"shape": dc.asdict(target.shape), "kept": target.kept}


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
