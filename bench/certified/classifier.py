"""A classifier with the images that are certified."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

from torch import Tensor, nn

from bench.workloads.hashes import tensors_hash
from lipbounds.targets.layers import Sequence


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Classifier:
    """A classifier with the images that are certified.

    Args:
        model: as its owner runs it.
        network: the same function as a network, made when it is asked for.
        images: of the test part, pixels in [0, 1], in the order in which they are certified.
        labels: their classes.
        indices: their places in the data.
    """

    model: nn.Module
    network: Callable[[], Sequence]
    images: Tensor
    labels: Tensor
    indices: list[int]

    @property
    def weights(self) -> str:
        """Hash of the weights."""
        return tensors_hash(self.model.state_dict().items())
