r"""Certified l2 radii of classifiers: the largest ball around an input in which the predicted class cannot change.

With logits f and the class y of the input, every other class j has the margin m_j = f_y - f_j >= 0 there. On the ball
B(x, eps) the margin falls by at most eps sup_B |grad (f_y - f_j)|, so the prediction is y all over it if

    eps sup_B |grad (f_y - f_j)| <= m_j  for every j != y,

each class with its own gradient, through the last layer with the row e_y - e_j. (At equality y still is a largest
logit.) The suprema over a ball are bounds on every smaller ball in it, so what is proved is more: the margin falls by
at most the integral of the suprema over the balls in between (lipbounds.compose.ray).

That is for `joint` and `product`; `taylor` bounds the fall of the margins itself (lipbounds.compose.taylor).

Rounding: every method covers everything that it computes. For `joint` and `product`, the suprema are rounded up as
their docstrings say; the forward pass is followed by a running error analysis (lipbounds.compose.running_error), whose
bounds are in the radii of what reaches inner layers, and in a bound t on the l2 distance of the computed logits to the
exact ones: a difference of two logits is off by at most sqrt(2) t, which is taken off every margin.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.compose.attack import smallest_margin
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.network import network_bound, output_at
from lipbounds.compose.one_input import network_of_input
from lipbounds.compose.ray import Slopes, farthest
from lipbounds.compose.running_error import lost_by
from lipbounds.compose.same_model import check_same
from lipbounds.compose.taylor import TaylorMargin, taylor_radius
from lipbounds.compose.taylor.ball import NORMS, Norm
from lipbounds.errors import InvalidInput, LipboundsError, Unsupported
from lipbounds.lazy import make_callable
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, inflate, product
from lipbounds.targets.given import WHOLE, given_tensor
from lipbounds.targets.layers import Layer, Linear, Sequence


QUICK = 8e6  # floats in one value of a Taylor model: about seconds per input, and less than a gigabyte
UNIT = "the input of the network, as passed"
PRECISION = 1e-3  # the search ends when the radius is not expected to grow by more than this share
Method = Literal["taylor", "joint", "product"]


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Certified radii of a batch of inputs.

    Args:
        radius: proved radius of each input in `norm`, in `unit`; 0 where the prediction is wrong, or nothing was
            proved.
        unit: of the radius: what `x` holds, such as pixels or normalised pixels; nothing is rescaled.
        correct: whether the prediction is the label.
        prediction: class of the largest logit.
        margin: smallest margin to another class; negative where the prediction is wrong.
        lipschitz: for each input and class, a bound on how far the margin f_y - f_j falls within the certified ball,
            divided by its radius.
        method: that was used.
        norm: of the balls.
        attacked: with `check=True`, the smallest margin that an attack found in each certified ball; >= 0.
    """

    radius: Float[Tensor, " batch"]
    unit: str
    correct: Tensor
    prediction: Int[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    lipschitz: Float[Tensor, "batch classes"]
    method: Method
    norm: Norm = "l2"
    attacked: Float[Tensor, " batch"] | None = None

    @property
    def rounding(self) -> str:
        """How the rounding of the forward pass is covered."""
        if self.method == "taylor":
            return "proved: the rounding of every value is bounded and carried"
        return "proved: a running error analysis of the forward pass is in the radii of all layers and in the margins"

    def accuracy(self, radius: float) -> float:
        """Share of the inputs that are classified right all over the ball of that radius.

        Args:
            radius: >= 0.
        """
        return float((self.correct & (self.radius >= radius)).double().mean())


def certify(
    network: Layer,
    x: Float[Tensor, "batch ..."] | Any,
    labels: Int[Tensor, " batch"] | Any,
    *,
    model: Callable[..., Any] | None = None,
    unit: str = UNIT,
    method: Method | None = None,
    norm: Norm = "l2",
    largest: float = 10.0,
    steps: int = 20,
    attention: str | tuple[str, ...] | None = None,
    check: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Certificate:
    """The radius around each input within which the prediction provably stays the label.

    Promise: no input within the radius of `x` has another class, in the arithmetic of real numbers; what is said of
    rounding is at the top of this file.

    Args:
        network: a classifier whose output is one token with a logit a feature, such as an adapter returns.
        x: inputs, one batch dimension; a tensor, a NumPy array, or a list.
        labels: the right classes; likewise.
        model: the classifier that the network stands for, a module or a callable that takes `x`; the certificate is
            refused unless logits and derivatives agree at `x` (lipbounds.compose.same_model). Without it the
            certificate is about the network alone.
        unit: what one step of an entry of `x` means, such as "pixels in [0, 1]"; the certificate names it.
        method: `taylor`, with the Taylor models of lipbounds.compose.taylor: mostly the largest radii, for networks and
            inputs of a few thousand numbers; `joint`, with the dense Jacobian of lipbounds.compose.joint, for small
            networks;
            `product`, with the product of norms of lipbounds.compose.network_bound, for any. By default `taylor`, or
            `joint` where that has no rule for a layer or would take far more than seconds per input, and where
            `attention` is given; the certificate says which.
        norm: of the balls: `l2`, or with `taylor` also `l_inf` and `l1`.
        largest: no larger radius is looked for.
        steps: balls tried for each input, at most.
        attention: names of the attention bounds on balls, for `joint` and `product` alone, as `taylor` asks no such
            bound; see `network_bound`.
        check: also run a short attack in every certified ball, which must not succeed.
        advance: called after each input, for a progress bar.

    Raises:
        InvalidInput: shapes do not fit, a label is no class, fewer than two classes, an option out of range.
        Unsupported: the network is too large for the method, or has a layer that it does not know; it is not `model`.
        LipboundsError: `check` found another class in a certified ball: a fault of this library.
    """
    x, labels = given_tensor("x", x), given_tensor("labels", labels)
    if method is None:
        method = "taylor" if norm != "l2" else None if attention is None else "joint"
    _check(network, x, labels, method, norm, largest, steps, attention)
    network, x, labels = network.to(torch.float64), x.detach().to(torch.float64), labels.to(x.device, torch.int64)
    logits = _logits(network, x, labels)
    if model is not None:
        check_same(network, model, x)
    networks = [network_of_input(network, index, len(x)) for index in range(len(x))]  # each with its own masks
    method = method or _fitting(networks[0], x[0])
    radii, slopes = [], []
    for own, image, row, label in zip(networks, x, logits, labels.tolist(), strict=True):
        radius, slope = _one(own, image, row, label, method, norm, largest, steps, attention)
        radii.append(radius)
        slopes.append(slope)
        advance()
    attacked = _attacked(networks, x, labels, radii, norm) if check else None
    return _certificate(x.new_tensor(radii), slopes, logits, labels, unit, method, norm, attacked)


def _certificate(
    radius: Tensor,
    slopes: list[Tensor],
    logits: Tensor,
    labels: Tensor,
    unit: str,
    method: Method,
    norm: Norm,
    attacked: Tensor | None,
) -> Certificate:
    """The radii with what the logits say at the inputs themselves."""
    chosen = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    prediction = logits.argmax(1)
    return Certificate(
        radius=radius,
        unit=unit,
        correct=prediction == labels,
        prediction=prediction,
        margin=chosen.squeeze(1) - others,
        lipschitz=torch.stack(slopes),
        method=method,
        norm=norm,
        attacked=attacked,
    )


def _logits(network: Layer, x: Tensor, labels: Tensor) -> Tensor:
    """The logits at the inputs, which tell whether the network is a classifier with these labels."""
    output = output_at(network, x)
    if output.dim() != 3 or output.shape[1] != 1 or output.shape[2] < 2:
        raise InvalidInput(
            f"network must return one token of at least two logits an input, [batch, 1, classes], got "
            f"{tuple(output.shape)}; end it with a Pool and a Linear, and give x a batch dimension (x[None] for one "
            "input)."
        )
    logits = output.squeeze(1)
    if not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        raise InvalidInput(f"labels must be between 0 and {logits.shape[1] - 1}, got {labels.min()} to {labels.max()}.")
    return logits


def _fitting(network: Layer, x: Tensor) -> Method:
    """`taylor` if it takes the network and seconds an input, else `joint`."""
    try:
        TaylorMargin(network, x, 0, largest=QUICK)
    except Unsupported:
        return "joint"
    return "taylor"


def _attacked(networks: list[Layer], x: Tensor, labels: Tensor, radii: list[float], norm: Norm) -> Tensor:
    """The smallest margin found in every certified ball."""
    found = []
    for index, (own, image, label, radius) in enumerate(zip(networks, x, labels.tolist(), radii, strict=True)):
        margin = smallest_margin(own, image, label, radius, norm=norm) if radius > 0 else 0.0
        if not margin >= 0:
            raise LipboundsError(
                f"the certificate of input {index} is wrong: within its radius {radius:.6g} an attack found the margin "
                f"{margin:.6g}. This is a fault of lipbounds; report it with the network and the input."
            )
        found.append(margin)
    return torch.tensor(found, dtype=x.dtype, device=x.device)


def _one(
    network: Layer,
    x: Tensor,
    logits: Tensor,
    label: int,
    method: Method,
    norm: Norm,
    largest: float,
    steps: int,
    attention: str | tuple[str, ...] | None,
) -> tuple[float, Tensor]:
    """Radius and slopes of one input."""
    unknown = torch.full_like(logits, torch.inf)
    identity = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    others = identity[label] == 0
    if not bool((logits[label] > logits[others]).all()):
        return 0.0, unknown
    if method == "taylor":
        search = {"largest": largest, "steps": steps, "precision": PRECISION}
        radius, falls = taylor_radius(network, x, label, norm=norm, **search)
        return radius, unknown if falls is None else falls
    rows = identity[label] - identity
    known_on = _joint(network, x, rows, attention) if method == "joint" else _product(network, x, rows, attention)

    def slopes_on(radius: float) -> Slopes:
        """The slopes of the margins to the other classes over a ball, and the margins less what rounding may do."""
        slopes, output, lost = known_on(radius)
        margins = output[label] - output
        off = inflate(2**0.5 * lost + 4 * UNIT_ROUNDOFF * margins.abs(), 8)
        return Slopes(radius, slopes[others], (margins - off)[others])

    radius, falls = farthest(slopes_on, largest=largest, steps=steps, precision=PRECISION)
    if falls is None:
        return 0.0, unknown
    return radius, torch.zeros_like(logits).masked_scatter(others, inflate(falls / radius, 4))


Known = tuple[Tensor, Tensor, Tensor]  # on a ball: the slopes of all margins, the logits, and how far they may be off


def _joint(
    network: Layer, x: Tensor, rows: Tensor, attention: str | tuple[str, ...] | None
) -> Callable[[float], Known]:
    prepared = JointNetwork(network, x, attention=attention)

    def known(radius: float) -> Known:
        bound = prepared.bound(radius, rows)
        return bound.rows, prepared.output, bound.lost

    return known


def _product(
    network: Layer, x: Tensor, rows: Tensor, attention: str | tuple[str, ...] | None
) -> Callable[[float], Known]:
    """The product of norms with the last layer replaced by the row of each class in turn: the trunk is bounded once."""
    layers = list(network.layers) if isinstance(network, Sequence) else [network]
    head = layers[-1]
    if len(layers) < 2 or not isinstance(head, Linear):
        raise InvalidInput("network must be a Sequence that ends in a Linear for method='product'.")
    trunk = Sequence(tuple(layers[:-1]))
    sizes = inflate(vector_norm(rows @ head.weight), rows.shape[1] + head.weight.shape[1] + 8)

    def known(radius: float) -> Known:
        bound = network_bound(trunk, x, radius, attention=attention if radius > 0 else None)
        output = head(bound.output)
        slopes = inflate(bound.value * sizes, 4)
        if bound.lost is None:  # at the point, where the search starts and nothing is proved
            return slopes, output.flatten(), torch.zeros_like(bound.value)
        own = lost_by(head, bound.output, output, 2)
        norm = inflate(head.weight.norm(), head.weight.numel() + 8)
        return slopes, output.flatten(), inflate(product(norm, bound.lost) + own, 4)

    return known


def _check(
    network: Layer,
    x: Tensor,
    labels: Tensor,
    method: str | None,
    norm: str,
    largest: float,
    steps: int,
    attention: str | tuple[str, ...] | None,
) -> None:
    if not isinstance(network, Layer):
        raise InvalidInput(
            f"network must be made of layers of lipbounds.targets.layers, got {type(network).__name__}; build it with "
            "an adapter (docs/howto/certify.md), and pass a torch module as model=."
        )
    if method not in (None, "taylor", "joint", "product"):
        raise InvalidInput(f"method must be 'taylor', 'joint' or 'product', got method={method!r}.")
    if norm not in NORMS or (norm != "l2" and method not in (None, "taylor")):
        raise InvalidInput(
            f"norm must be one of {NORMS}, and for another one than l2 the method 'taylor', got norm={norm!r} and "
            f"method={method!r}."
        )
    if attention is not None and method == "taylor":
        raise InvalidInput(
            f"attention names bounds for the methods 'joint' and 'product', and 'taylor' asks none of them, got "
            f"attention={attention!r}, method={method!r} and norm={norm!r}; leave one of them out."
        )
    if not 0 < largest < math.inf:
        raise InvalidInput(f"largest must be positive and finite, got largest={largest}.")
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, got steps={steps}.")
    if x.dim() < 1:
        raise InvalidInput("x must hold one input or more along its first dimension, got a single number.")
    if labels.dtype not in WHOLE or labels.dim() != 1 or len(labels) != len(x):
        raise InvalidInput(
            f"labels must be one integer an input, got {labels.dtype} of shape {tuple(labels.shape)} for "
            f"{len(x)} inputs."
        )
    if len(x) == 0 or not bool(x.isfinite().all()):
        raise InvalidInput(f"x must hold at least one input and be finite, got shape {tuple(x.shape)}.")


make_callable(__name__, "certify")
