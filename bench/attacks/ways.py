"""How AutoAttack is run: by which package, with which of its attacks, and at how many other classes they aim.

Two packages implement it: `autoattack`, by its authors, which is on no package index, and `pyautoattack`, a port that
the extra `bench` installs. The studies of this repository use the second. A model of a user is attacked by the first
where it can be imported. The standard version aims at nine other classes and so needs ten; for a model with fewer, the
targeted attacks aim at all other classes, and below four classes, where the targeted loss of APGD is not defined, the
untargeted FAB takes their place.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn


AUTHORS, PORT = "autoattack", "pyautoattack"
STANDARD_TARGETS = 9
STANDARD_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
FEWEST_TARGETED = 4  # classes for which APGD-T has a loss: it divides by a difference of the largest and later logits


@dc.dataclass(frozen=True, kw_only=True)
class Way:
    """How AutoAttack is run.

    Args:
        package: that runs it.
        attacks: in their order.
        targets: other classes that the targeted attacks aim at, the most probable ones; 0 where none is targeted.
    """

    package: str = PORT
    attacks: tuple[str, ...] = STANDARD_ATTACKS
    targets: int = STANDARD_TARGETS

    @property
    def classes(self) -> int:
        """The smallest number of classes of a model that is attacked in this way."""
        return max(2, self.targets + 1)

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.targets == STANDARD_TARGETS and self.attacks == STANDARD_ATTACKS:
            return "AutoAttack-standard"
        aimed = f"; {self.targets} targets" if self.targets else ""
        return f"AutoAttack ({', '.join(name.upper() for name in self.attacks)}{aimed})"

    def moved(self, model: nn.Module, images: Tensor, labels: Tensor, *, norm: str, eps: float, seed: int) -> Tensor:
        """The images after all attacks, as the package leaves them.

        Args:
            model: the classifier.
            images: 4-dimensional, in [0, 1].
            labels: the right classes.
            norm: as the packages name it, Linf or L2.
            eps: radius.
            seed: of all that is random.
        """
        settings: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "device": str(images.device)}
        if self.package == AUTHORS:
            settings["verbose"] = False
        attacker = importlib.import_module(self.package).AutoAttack(model, version="standard", **settings)
        attacker.attacks_to_run = [*self.attacks]
        attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = max(1, self.targets)
        batch = {"bs" if self.package == AUTHORS else "batch_size": len(images)}
        found = attacker.run_standard_evaluation(images, labels, **batch)
        return found[0] if isinstance(found, tuple) else found


STANDARD = Way()
APGD = Way(attacks=STANDARD_ATTACKS[:2])  # what finds nearly all that the standard version finds


def way_for(classes: int) -> Way | None:
    """How a model of a user is attacked; None where neither package is installed.

    Args:
        classes: of the model, at least 2.
    """
    package = next((name for name in (AUTHORS, PORT) if _origin(name)), None)
    if package is None:
        return None
    if classes < FEWEST_TARGETED:
        return Way(package=package, attacks=("apgd-ce", "fab", "square"), targets=0)
    return Way(package=package, targets=min(STANDARD_TARGETS, classes - 1))


def version_of(package: str) -> str:
    """The version of an installed package; where it comes from its authors, whose number stays, with its content.

    Args:
        package: its name in Python.
    """
    try:
        number = version(package).partition("+")[0]
    except PackageNotFoundError:
        number = "unknown version"
    origin = _origin(package)
    if package != AUTHORS or origin is None:
        return number
    digest = hashlib.sha256()
    for path in sorted(origin.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{number}, content {digest.hexdigest()[:12]}"


def _origin(package: str) -> Path | None:
    """Its file; None where it cannot be imported, or is a folder of that name and no package."""
    spec = find_spec(package)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
