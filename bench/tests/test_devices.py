"""Each task on a device of its own: the answers are those of the CPU, and the device is part of the question."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.smallest import Effort
from bench.attacks.ways import STANDARD
from bench.attention import measures
from bench.attention import task as attention
from bench.balls import task as balls
from bench.certified import models, radii
from bench.certified import task as certified
from bench.engine.store import Store
from bench.robustness import attacked, classifier_task
from bench.robustness import measures as robustness_measures
from bench.robustness import task as robustness
from bench.robustness.classifier import FromPixels, LoadedClassifier
from bench.robustness.folder import LabelledFolder
from bench.robustness.settings import BASELINE, SETTINGS, Profile, recipe
from bench.robustness.training import Workshop
from bench.speed import pareto, training_steps
from bench.speed import task as speed
from bench.speed.plan import PROFILES
from bench.tests.samples import tiny_case, tiny_model
from bench.tightness import task as tightness
from bench.workloads.case import Case
from bench.workloads.radii import ONE, Multiple
from lipbounds import registry
from lipbounds.models.digits_data import DigitsSplit, load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.targets.layers import Linear, Patches, Sequence


DEVICES = "cpu", "pretend"
QUICK = Effort(iterations=2, fab_targets=1, apgd_targets=1)
TIMES = ("seconds", "seconds_constant", "megabytes")


def on_both(folder: Path, run: Callable[[Store, torch.device], Any]) -> tuple[list[Any], list[Any]]:
    """What a task keeps for each device, times left out."""
    found = []
    for name in DEVICES:
        with Store(folder / f"{name}.jsonl") as store:
            run(store, torch.device(name))
        entries = Store(folder / f"{name}.jsonl", only_read=True).entries.values()
        assert {entry.question["device"] for entry in entries if "device" in entry.question} == {name}
        found.append([entry.answer for entry in entries])
    assert found[0]
    return found[0], found[1]


def assert_same(there: Any, here: Any, *, rel: float = 1e-6) -> None:
    """Answers are equal but for rounding and times."""
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        for name in here.keys() - {*TIMES}:
            assert_same(there[name], here[name], rel=rel)
    elif isinstance(here, list):
        assert len(there) == len(here)
        for one, other in zip(there, here, strict=True):
            assert_same(one, other, rel=rel)
    else:
        assert there == (pytest.approx(here, rel=rel, abs=1e-9) if isinstance(here, float) else here)


def tiny_classifier(device: torch.device) -> models.Classifier:
    """A linear classifier of digits, whose certified radius is exact."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 10, bias=False)
    linear.weight.data = torch.randn(10, 64, generator=generator)
    model = nn.Sequential(nn.Flatten(), linear)
    images = 0.3 + 0.4 * torch.rand(3, 1, 8, 8, generator=generator)
    labels = model(images).argmax(1)
    labels[2] = (labels[2] + 1) % 10
    model.to(device)
    return models.Classifier(
        model=model,
        network=lambda: Sequence((Patches((8, 8), (8, 8)), Linear(linear.weight.detach()))),
        images=images.to(device),
        labels=labels.to(device),
        indices=[0, 1, 2],
    )


def test_tightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [registry.get(name) for name in ("exact", "lanczos", "lanczos_certificate", "yudin2025.biased")]
    chosen += [registry.get("yudin2025_ball.biased")]
    monkeypatch.setattr(registry, "select", lambda **_: chosen)
    monkeypatch.setattr(registry, "refuted", list)
    here, there = on_both(
        tmp_path, lambda store, device: tightness.run(store, [tiny_model()], quick=True, device=device)
    )
    assert {answer["status"] for answer in here} == {"ok"}
    assert_same(there, here)


def test_balls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balls, "cases", lambda quick, models: iter([(tiny_case(biases=False), (Multiple(0.1, ONE),))]))
    here, there = on_both(tmp_path, lambda store, device: balls.run(store, device=device))
    assert {answer["status"] for answer in here} == {"ok"}
    assert_same(there, here)


def test_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified, "load", lambda name, device, peer: tiny_classifier(device))
    monkeypatch.setattr(certified, "raw_hashes", lambda name: ("weights", "input"))
    monkeypatch.setattr(certified, "whole_model", whole_model)
    monkeypatch.setitem(radii.SMOOTHING, "samples", 50)
    monkeypatch.setattr(radii, "EFFORT", QUICK)
    monkeypatch.setitem(certified.LANCZOS, "steps", 14)
    amount = radii.Amount(images=1, slower=1, smoothed=1, attacked=3)
    profile = certified.Profile(amounts={"digits-vit": amount}, whole=("digits-vit",), formed=())
    assert_same(*on_both(tmp_path, lambda store, device: certified.run(store, profile, device=device)))


def whole_model(name: str, device: torch.device) -> tuple[Sequence, Tensor]:
    found = tiny_classifier(device)
    return found.network().to(torch.float64), found.images[:1].double()


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [registry.get(name) for name in ("sharp_fast", "yudin2025.biased")]
    monkeypatch.setattr(attention, "by_input", lambda name, count: iter([[cases()]]))
    for module in (measures, attention):
        monkeypatch.setattr(module, "methods", lambda block: few)
    monkeypatch.setitem(attention.CLASSIFIERS, "digits-vit", nearest_mean)
    profile = attention.Profile(inputs={"minilm": 1}, attacked={"digits-vit": 3}, norms=("L2",), rows=1, effort=QUICK)
    here, there = on_both(tmp_path, lambda store, device: attention.run(store, profile, {}, device=device))
    assert any(answer.get("distances") for answer in here)
    assert_same(there, here)


def nearest_mean() -> nn.Module:
    """A linear classifier of digits that is right about most of them."""
    train = load_digits_split().train
    means = torch.stack([train.images[train.labels == digit].mean(0).flatten() for digit in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = means, -means.square().sum(1) / 2
    return model


def cases() -> Case:
    return dc.replace(tiny_case(tokens=4), model="minilm")


def test_robustness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setitem(robustness_measures.LANCZOS, "steps", 20)
    monkeypatch.setattr(robustness_measures, "BOUNDS", ("yudin2025.biased",))
    monkeypatch.setattr(attacked, "PGD_STEPS", 2)
    profile = Profile(settings=(BASELINE,), seeds=(0,), epochs=1, images=2, batch=2, eps={"l2": (0.1,)}, blocks=1)

    def run(store: Store, device: torch.device) -> None:
        robustness.run(Workshop(store, tmp_path / "weights", few_digits(), device=device.type), profile)

    assert_same(*on_both(tmp_path, run))


def test_a_classifier_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr(attacked, "PGD_STEPS", 2)
    test, profile = few_digits().test, classifier_task.Profile(images=2, batch=2, blocks=0, eps={"l_inf": (0.02,)})
    given = LabelledFolder(
        images=test.images[:2], labels=test.labels[:2], names=["a", "b"], classes=10, available=2, numbered=True
    )

    def run(store: Store, device: torch.device) -> None:
        found = LoadedClassifier(name="digits", module=FromPixels(load_digits_vit(), None), image=None, classes={})
        classifier_task.run(store, found, given, profile, way=STANDARD, device=device)

    assert_same(*on_both(tmp_path, run))


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack is one of its four attacks, with few steps."""
    attack = pytest.importorskip("pyautoattack").AutoAttack
    whole = attack.run_standard_evaluation

    def short(attacker: Any, *arguments: Any, **options: Any) -> Any:
        attacker.attacks_to_run, attacker.apgd.n_iter, attacker.apgd.n_restarts = ["apgd-ce"], 5, 1
        return whole(attacker, *arguments, **options)

    monkeypatch.setattr(attack, "run_standard_evaluation", short)


def few_digits() -> DigitsSplit:
    whole = load_digits_split()
    few = {
        name: dc.replace(part, images=part.images[:40], labels=part.labels[:40], indices=part.indices[:40])
        for name, part in ((field.name, getattr(whole, field.name)) for field in dc.fields(whole))
    }
    return dc.replace(whole, **few)


@pytest.mark.parametrize("name", ["jasmin", "spectral", "jacobian", "sharp", "pgd"])
def test_robust_training(name: str) -> None:
    from bench.robustness.penalties import loss_of

    split, used = few_digits(), recipe(SETTINGS[name], 1.0 if SETTINGS[name].grid else None, epochs=1, seed=0)
    found = []
    for device in DEVICES:
        model = load_digits_vit().to(device)
        images, labels = split.train.images[:4].to(device), split.train.labels[:4].to(device)
        loss_of(used)(model, images, labels, torch.Generator().manual_seed(0)).backward()
        found.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)


def test_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_memory", called)
    monkeypatch.setattr(pareto, "BLOCKS", {"tiny": lambda: tiny_case(tokens=4).block})
    monkeypatch.setattr(pareto, "methods", lambda: ["yudin2025.biased"])
    profile = dc.replace(
        PROFILES["quick"],
        axes={"batch": 1},
        methods=("yudin2025.biased",),
        enough=0.0,
        repeats=1,
        limit=1e9,
        patience=1e9,
        streaming=(8,),
        pareto=0.001,
        targets=0,
    )
    here, there = on_both(tmp_path, lambda store, device: speed.run(store, profile, device=device))
    assert len(here) == len(there)
    assert not any("error" in answer for answer in there)
    assert [each.get("value") for each in there] == [
        pytest.approx(each["value"]) if "value" in each else None for each in here
    ]


def called(make: Any, device: torch.device) -> None:
    """In place of what measures memory and collects garbage, which takes seconds."""
    make()()


def test_training_steps() -> None:
    found = training_steps.measured("digits-vit", repeats=1, enough=0.0, device=torch.device("pretend:0"))
    assert found["repeats"] == 1
