"""What is compared, how each model is trained, and what a profile says."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from bench.attacks.images import Norm
from bench.attacks.ways import STANDARD, Way
from lipbounds.models.train_digits import WEIGHT_DECAY


VERSION = 1  # of what is computed here: raise it when numbers change
BASELINE = "none"
# Weights are chosen with a seed of its own; none of its numbers is reported as a result.
CHOICE_SEED = 1000
CHOICE_EPS = 0.05
CHOICE_STEPS = 10
OF_USER = ("loss", "code")  # parts of a recipe that only a user's function has
LEFT_OUT = (*OF_USER, "data", "pace", "start")  # of the record of a recipe, where they are empty
TUNING_RATE = 1 / 3  # of the peak learning rate, when a trained model is trained on
CLEAN_LOSS = 0.01  # validation accuracy that a weight may cost, as a share


@dc.dataclass(frozen=True, kw_only=True)
class Adversary:
    """PGD that moves the training images.

    Args:
        norm: of the ball.
        eps: its radius.
        steps: number of steps, each of 2.5 eps over their number, from a random start.
    """

    norm: Norm = "l_inf"
    eps: float = 0.1
    steps: int = 5


@dc.dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to train.

    Args:
        name: unique.
        title: for tables.
        penalty: of `bench.robustness.penalties`, or the path of a function of a user; empty for none.
        grid: weights to choose from; of the penalty, or of the decay where there is no penalty; empty for none.
        adversary: what moves the training images, if anything.
        reference: the setting that weights are judged against, and that results are compared with beside the baseline.
        loss: the path of a function of a user that is minimised instead; empty for none.
        code: hash of what the user wrote; empty where nothing is a user's.
        weight: that is taken without a choice; None where there is a grid or no penalty.
        start: the setting whose model of the same seed is trained on; empty for a random start.
    """

    name: str
    title: str
    penalty: str = ""
    grid: tuple[float, ...] = ()
    adversary: Adversary | None = None
    reference: str = BASELINE
    loss: str = ""
    code: str = ""
    weight: float | None = None
    start: str = ""

    @property
    def decay(self) -> bool:
        """Whether the weight is that of the decay."""
        return bool(self.grid) and not self.penalty


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(name=BASELINE, title="no penalty"),
        Setting(name="weight-decay", title="weight decay", grid=(0.5, 1.5, 5.0)),
        Setting(name="jasmin", title="JaSMin, k = 10", penalty="jasmin", grid=(0.001, 0.003, 0.01, 0.03)),
        # Heavier than what validation data choose above.
        Setting(name="jasmin-heavy", title="JaSMin, k = 10, weight 0.03", penalty="jasmin", grid=(0.03,)),
        Setting(name="jasmin-0", title="JaSMin, k = 0", penalty="jasmin-0", grid=(0.0003, 0.001, 0.003, 0.01)),
        Setting(name="spectral", title="spectral norms (SpecFormer-like)", penalty="spectral", grid=(0.03, 0.1, 0.3)),
        Setting(name="jacobian", title="Jacobian norm", penalty="jacobian", grid=(0.003, 0.01, 0.03, 0.1)),
        Setting(name="sharp", title="log of sharp_fast", penalty="sharp", grid=(0.03, 0.1, 0.3)),
        Setting(name="pgd", title="PGD training", adversary=Adversary()),
        Setting(
            name="pgd-jasmin",
            title="PGD training + JaSMin, k = 10",
            penalty="jasmin",
            grid=(0.03, 0.1, 0.3),
            adversary=Adversary(),
            reference="pgd",
        ),
    )
}
# JaSMin at fixed weights, up to where it costs accuracy: a curve of clean and robust accuracy over the weight.
CURVE = {
    setting.name: setting
    for penalty, k in (("jasmin", 10), ("jasmin-0", 0))
    for weight in (0.003, 0.03, 0.3, 3.0)
    for setting in (
        Setting(
            name=f"{penalty} {weight:g}", title=f"JaSMin, k = {k}, weight {weight:g}", penalty=penalty, weight=weight
        ),
    )
}
# Weights that no validation images choose, for studies that have no time for it.
GIVEN = {
    f"{name} {weight:g}": dc.replace(
        SETTINGS[name],
        name=f"{name} {weight:g}",
        title=f"{SETTINGS[name].title}, weight {weight:g}",
        grid=(),
        weight=weight,
    )
    for name, weight in (("spectral", 0.1), ("jacobian", 0.01))
}
# A trained baseline is trained on, with what a setting adds and without: the first one is the control.
CONTROL = "tuned"
_NEAR = Adversary(eps=0.05, steps=3)
TUNED = {
    setting.name: setting
    for setting in (
        Setting(name=CONTROL, title="fine-tuned, no penalty", start=BASELINE),
        *(
            Setting(
                name=f"jasmin tuned {weight:g}",
                title=f"fine-tuned with JaSMin, k = 10, weight {weight:g}",
                penalty="jasmin",
                weight=weight,
                start=BASELINE,
                reference=CONTROL,
            )
            for weight in (0.03, 0.3, 3.0)
        ),
        Setting(
            name="jacobian tuned 0.01",
            title="fine-tuned with the Jacobian norm, weight 0.01",
            penalty="jacobian",
            weight=0.01,
            start=BASELINE,
            reference=CONTROL,
        ),
        Setting(name="pgd tuned", title="fine-tuned with PGD", adversary=_NEAR, start=BASELINE, reference=CONTROL),
        Setting(
            name="pgd-jasmin tuned 0.3",
            title="fine-tuned with PGD + JaSMin, k = 10, weight 0.3",
            penalty="jasmin",
            weight=0.3,
            adversary=_NEAR,
            start=BASELINE,
            reference="pgd tuned",
        ),
    )
}
ALL = SETTINGS | CURVE | GIVEN | TUNED


@dc.dataclass(frozen=True, kw_only=True)
class Pace:
    """Steps of other sizes than those of `lipbounds.models.train_digits`; the weights of the last epoch are kept.

    Args:
        batch: images of a step.
        rate: the peak learning rate.
    """

    batch: int
    rate: float


@dc.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights of one model depend on, but for versions and hardware.

    Args:
        setting: its name.
        penalty: of `bench.robustness.penalties`, or the path of a function of a user; empty for none.
        weight: of the penalty.
        weight_decay: of AdamW.
        adversary: what moves the training images, if anything.
        epochs: passes over the training images.
        seed: of the first weights, the order of the images, the distortions, and of penalty and adversary.
        loss: the path of a function of a user that is minimised instead; empty for none.
        code: hash of what the user wrote; empty where nothing is a user's.
        data: images and architecture, where they are not the digits and their ViT.
        pace: steps of other sizes than those of the digits.
        start: the model that is trained on; None for a random start.
    """

    setting: str
    penalty: str
    weight: float
    weight_decay: float
    adversary: Adversary | None
    epochs: int
    seed: int
    loss: str = ""
    code: str = ""
    data: str = ""
    pace: Pace | None = None
    start: Recipe | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without what only a user's function or other images have."""
        found = {**dc.asdict(self), "start": self.start and self.start.to_dict()}
        return {name: value for name, value in found.items() if value or name not in LEFT_OUT}


def recipe(setting: Setting, weight: float | None, *, epochs: int, seed: int, data: str = "") -> Recipe:
    """How a model of a setting is trained.

    Args:
        setting: the setting.
        weight: one of its grid; None where it has none.
        epochs: passes over the training images.
        seed: of everything random.
        data: images and architecture; empty for the digits.
    """
    chosen = 0.0 if weight is None else weight
    return Recipe(
        setting=setting.name,
        penalty=setting.penalty,
        weight=chosen if setting.penalty else 0.0,
        weight_decay=chosen if setting.decay else WEIGHT_DECAY,
        adversary=setting.adversary,
        epochs=epochs,
        seed=seed,
        loss=setting.loss,
        code=setting.code,
        data=data,
    )


def reference_of(name: str) -> str:
    """What a setting is compared with beside the baseline; of a user's setting it is the baseline.

    Args:
        name: of the setting.
    """
    return ALL[name].reference if name in ALL else BASELINE


def starts_from(name: str) -> str:
    """The setting whose models a setting trains on; empty where it draws its own, as settings of a user do.

    Args:
        name: of the setting.
    """
    return ALL[name].start if name in ALL else ""


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        settings: names, the baseline first; a setting stands after its reference.
        seeds: of the models that are reported.
        epochs: of every training.
        images: test images that are attacked, the first ones.
        batch: images in one attack, and so in one answer.
        eps: radii in each norm, rising.
        blocks: test images at which attention blocks are measured, the first ones.
        largest_grid: weights of a grid that are tried, from its middle; 0 for all.
        own: settings of a user, which follow the others.
        weak_steps: steps of a PGD that is shown beside the worst case; 0 for none.
        pace: steps of other sizes than those of the digits.
        tuning_epochs: of the trainings that go on from a trained model.
        way: which part of AutoAttack attacks every model, after FGSM and PGD; None for none.
        standard: settings and seeds of the models that all of AutoAttack-standard attacks beside, where `way` is less.
        data: images and architecture, as recipes hold them; empty for the digits.
    """

    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    images: int
    batch: int
    eps: dict[Norm, tuple[float, ...]]
    blocks: int
    largest_grid: int = 0
    own: tuple[Setting, ...] = ()
    weak_steps: int = 0
    data: str = ""
    pace: Pace | None = None
    tuning_epochs: int = 0
    way: Way | None = STANDARD
    standard: tuple[tuple[str, int], ...] = ()

    def recipe(self, setting: Setting, weight: float | None, seed: int) -> Recipe:
        """How a model is trained.

        Args:
            setting: the setting.
            weight: one of its grid, or its own; None where it has none.
            seed: of everything random.
        """
        first = ALL[setting.start] if setting.start else None
        epochs, pace = self.epochs, self.pace
        if first is not None:
            epochs, pace = self.tuning_epochs, pace and dc.replace(pace, rate=TUNING_RATE * pace.rate)
        start = first and self.recipe(first, first.weight, seed)
        return dc.replace(recipe(setting, weight, epochs=epochs, seed=seed, data=self.data), pace=pace, start=start)

    @property
    def chosen(self) -> list[Setting]:
        """All settings, in order."""
        return [*(ALL[name] for name in self.settings), *self.own]
