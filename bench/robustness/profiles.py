"""How much of the study each profile does, on the digits and on images of 28 x 28 pixels."""

from __future__ import annotations

from bench.attacks.ways import APGD
from bench.robustness.settings import BASELINE, CONTROL, SETTINGS, TUNED, Pace, Profile


PROFILES = {
    "quick": Profile(
        settings=(BASELINE, "jasmin"),
        seeds=(0,),
        epochs=5,
        images=3,
        batch=3,
        eps={"l_inf": (0.2,)},
        blocks=1,
        largest_grid=1,
    ),
    # Few settings rather than few seeds: what two CPU cores can finish in two hours. The penalty on the Jacobian is
    # known to help, and shows that the numbers can tell.
    "standard": Profile(
        settings=(BASELINE, "jasmin", "jacobian"),
        seeds=(0, 1, 2, 3, 4),
        epochs=60,
        images=200,
        batch=100,
        eps={"l_inf": (0.05, 0.1), "l2": (0.25, 0.5)},
        blocks=20,
    ),
    "full": Profile(
        settings=tuple(SETTINGS),
        seeds=tuple(range(10)),
        epochs=60,
        images=200,
        batch=100,
        eps={"l_inf": (0.025, 0.05, 0.1, 0.15), "l2": (0.125, 0.25, 0.5, 1.0)},
        blocks=50,
    ),
}

# Models of 28 x 28 pixels that all of AutoAttack-standard attacks.
STANDARD_MODELS = (
    *((name, seed) for seed in range(5) for name in ("jasmin tuned 0.3", CONTROL)),
    (BASELINE, 0),
    ("pgd tuned", 0),
    ("pgd-jasmin tuned 0.3", 0),
)
FULL_SETTINGS = (BASELINE, "jasmin 0.03", "jasmin 0.3", "jasmin 3", "jasmin-0 0.3", "spectral 0.1", *TUNED)
# Of images of 28 x 28 pixels (bench/robustness/studies.py).
LARGER_PROFILES = {
    "quick": Profile(
        settings=(BASELINE, "jasmin 0.03"),
        seeds=(0,),
        epochs=1,
        images=3,
        batch=3,
        eps={"l_inf": (0.1,)},
        blocks=1,
        weak_steps=10,
        pace=Pace(batch=64, rate=3e-3),
    ),
    # Few weights rather than few seeds: penalties from a random start, and a baseline trained on with penalties, PGD or
    # both and, as the control, with neither. AutoAttack, which costs most, on all seeds of JaSMin and of the control
    # that it is compared with, and on one baseline and one of each that was trained with PGD, where most images stand.
    "standard": Profile(
        settings=(BASELINE, "jasmin 0.03", "jasmin-0 0.3", "spectral 0.1", *TUNED),
        seeds=(0, 1, 2, 3, 4),
        epochs=15,
        images=200,
        batch=100,
        eps={"l_inf": (0.05,), "l2": (0.75,)},
        blocks=10,
        weak_steps=10,
        pace=Pace(batch=64, rate=3e-3),
        tuning_epochs=5,
        way=None,
        standard=STANDARD_MODELS,
    ),
    # Two hours of one core with 5,000 images: the two parts of AutoAttack that find nearly all on every model, and all
    # four on those of one seed.
    "full": Profile(
        settings=FULL_SETTINGS,
        seeds=(0, 1, 2, 3, 4),
        epochs=15,
        images=100,
        batch=100,
        eps={"l_inf": (0.05,), "l2": (0.75,)},
        blocks=10,
        weak_steps=10,
        pace=Pace(batch=64, rate=3e-3),
        tuning_epochs=5,
        way=APGD,
        standard=tuple((name, 0) for name in FULL_SETTINGS),
    ),
}
