"""How much each profile certifies and attacks, and whose whole-model bounds it evaluates."""

from __future__ import annotations

import dataclasses as dc

from bench.certified.models import CERTIFIED_MNIST, MNIST, MNIST_3
from bench.certified.radii import Amount


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        amounts: of each classifier.
        whole: models whose bound is compared with their constant.
        formed: of those, whose Jacobian is formed row by row, too.
    """

    amounts: dict[str, Amount]
    whole: tuple[str, ...]
    formed: tuple[str, ...]


WHOLE = ("digits-vit", "lipschitz-vit", "certified-vit", "minilm", "gpt-2", "vit-b-16")
DIGITS = (0.1, 0.2, 0.3, 0.5)
PROFILES = {
    "quick": Profile(
        amounts={
            "lipschitz-vit": Amount(images=3, slower=3, attacked=3, radii=DIGITS[:1]),
            "digits-vit": Amount(images=1),
        },
        whole=("lipschitz-vit",),
        formed=("lipschitz-vit",),
    ),
    "standard": Profile(
        amounts={
            "certified-vit": Amount(images=36, smoothed=2, attacked=36, radii=DIGITS),
            "lipschitz-vit": Amount(images=24, slower=3, smoothed=2, attacked=24, radii=DIGITS),
            # Taylor models of four blocks take two minutes and ten gigabytes per image: with --full.
            "digits-vit": Amount(images=0, slower=1, smoothed=1, attacked=5, radii=(0.3,)),
        },
        whole=WHOLE,
        formed=WHOLE,
    ),
    "full": Profile(
        amounts={
            "certified-vit": Amount(images=360, slower=120, smoothed=120, attacked=360, radii=DIGITS),
            "lipschitz-vit": Amount(images=120, slower=120, smoothed=120, attacked=120, radii=DIGITS),
            "digits-vit": Amount(images=120, slower=120, smoothed=120, attacked=120, radii=(0.3,)),
        },
        whole=WHOLE,
        formed=WHOLE,
    ),
}
QUOTED = (36 / 255, 72 / 255, 108 / 255)  # radii at which others give certified accuracy on MNIST
PEER = {  # the ViTs on MNIST, in the quick and standard profiles
    CERTIFIED_MNIST: Amount(images=50, smoothed=1, attacked=50, radii=QUOTED),
    MNIST: Amount(images=100, smoothed=1, attacked=20, other_norms=50),
}
# Three layers take gigabytes and minutes per image.
PEER_FULL = {
    **PEER,
    CERTIFIED_MNIST: dc.replace(PEER[CERTIFIED_MNIST], images=100, attacked=100),
    MNIST: dc.replace(PEER[MNIST], other_norms=100),
    MNIST_3: Amount(images=20),
}
