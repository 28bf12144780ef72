"""SeqLip (Virmaux and Scaman, NeurIPS 2018): AutoLip with the activations of ReLU networks in the middle.

    ||J||  <=  ||A_K|| max_D ||B_K D A_{K-1}|| ... max_D ||B_2 D A_1|| ||B_1||,    ||A_K|| = ||B_1|| = 1

| symbol | meaning |
|---|---|
| W_k = A_k B_k | A_k = U_k S_k^p, B_k = S_k^(1-p) V_k^T from the singular value decomposition |
| p | 1 for the first layer, 0 for the last, 1/2 between |
| D | diagonal of zeros and ones; each maximum is over the 2^m patterns of m neurons |
| E_k = W_k - A_k B_k | what the computed factors leave, ||E_k|| <= e_k; added as prod (n_k + e_k) - prod n_k |
| n_k | >= ||A_k B_k|| |

Recollected, not read here; the rounding is ours. Proof: docs/bounds/estimators.md, "SeqLip".
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.errors import Unsupported
from lipbounds.estimators.autolip import AUTHORS, TITLE, autolip_product, product_upper, require_relu
from lipbounds.ops.eigen import singular
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, gamma, inflate
from lipbounds.targets.mlp import Mlp


MOST_NEURONS = 14  # 16 384 patterns for a layer, a second or two
CHUNK = 1024  # patterns at once


@bound(
    name="seqlip",
    claim=Claim(kind="proved", scope="global"),
    source=Source(title=TITLE, authors=AUTHORS, year=2018, arxiv="1805.10965", statement="SeqLip, recollected"),
    cost="O(2^m m^3 K), m neurons in a hidden layer",
    role="estimator",
    target=Mlp,
)
@torch.no_grad()
def seqlip(block: Mlp) -> Tensor:
    """SeqLip with the maximum over all patterns of active neurons, for relu networks with at most 14 in a layer.

    Promise: at least the Lipschitz constant on all inputs, in l2, and at most AutoLip; the same number for every batch
    item. Numerics: float64, rounded up, the rounding of the decompositions included. Not differentiable.

    Args:
        block: the network, with the activation `relu`.

    Raises:
        Unsupported: another activation, or a hidden layer with more than 14 neurons.
    """
    wide = block.double
    require_relu("seqlip", wide)
    widest = max((weight.shape[0] for weight in wide.weights[:-1]), default=0)
    if widest > MOST_NEURONS:
        raise Unsupported(
            f"seqlip tries all patterns of at most {MOST_NEURONS} neurons in a hidden layer, got {widest}; "
            "use autolip for a bound, seqlip_greedy for an estimate."
        )
    product = autolip_product(wide)
    if len(wide.weights) > 1:
        factors = _factors(wide)
        stages = [_largest(right, left) for right, left in _stages(factors)]
        ends = [spectral_norm_upper(factors[-1][0]), spectral_norm_upper(factors[0][1])]
        refined = inflate(product_upper([*stages, *ends]) + _defect(wide, factors), 2)
        product = torch.minimum(product, refined)
    return cast_up(product, block.dtype).expand(block.batch_shape)


@bound(
    name="seqlip_greedy",
    claim=Claim(kind="estimate", scope="global"),
    source=Source(title=TITLE, authors=AUTHORS, year=2018, arxiv="1805.10965", statement="greedy SeqLip, recollected"),
    cost="O(m^2 D^3 K), m neurons in a hidden layer",
    role="estimator",
    target=Mlp,
)
@torch.no_grad()
def seqlip_greedy(block: Mlp) -> Tensor:
    """SeqLip with each maximum by flipping one neuron at a time, for relu networks of any width.

    No promise: the maxima may be missed, so the product is neither an upper bound on the Lipschitz constant nor a lower
    one. It starts with all neurons active and flips the one that helps most until none does. Not differentiable.

    Args:
        block: the network, with the activation `relu`.

    Raises:
        Unsupported: another activation.
    """
    wide = block.double
    require_relu("seqlip_greedy", wide)
    if len(wide.weights) == 1:
        return autolip_product(wide).to(block.dtype).expand(block.batch_shape)
    stages = [_climbed(right, left) for right, left in _stages(_factors(wide))]
    return product_upper(stages).to(block.dtype).expand(block.batch_shape)


def _factors(network: Mlp) -> list[tuple[Tensor, Tensor]]:
    """(A_k, B_k) of each layer."""
    pairs, last = [], len(network.weights) - 1
    for layer, weight in enumerate(network.weights):
        u, s, vh = singular(weight)
        power = 1.0 if layer == 0 else 0.0 if layer == last else 0.5
        pairs.append((u * s**power, s[:, None] ** (1 - power) * vh))
    return pairs


def _stages(factors: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """(B_{k+1}, A_k) for each hidden layer."""
    return [(later[1], earlier[0]) for earlier, later in itertools.pairwise(factors)]


def _largest(right: Float[Tensor, "rows neurons"], left: Float[Tensor, "neurons cols"]) -> Float[Tensor, ""]:
    """max_D ||right D left|| over all 0/1 patterns, rounded up."""
    neurons = left.shape[0]
    numbers = torch.arange(2**neurons, device=left.device)
    best = left.new_zeros(())
    for chunk in numbers.split(CHUNK):
        patterns = (chunk[:, None] >> torch.arange(neurons, device=left.device)) & 1
        best = torch.maximum(best, _norms(right, patterns.to(left.dtype), left).amax())
    return best


def _climbed(right: Float[Tensor, "rows neurons"], left: Float[Tensor, "neurons cols"]) -> Float[Tensor, ""]:
    """||right D left|| at a pattern that no flip of one neuron improves."""
    pattern = left.new_ones(1, left.shape[0])
    best = _norms(right, pattern, left)[0]
    flips = torch.eye(left.shape[0], dtype=left.dtype, device=left.device)
    while True:
        neighbours = (pattern - flips).abs()
        norms = _norms(right, neighbours, left)
        if not bool(norms.amax() > best):
            return best
        pattern, best = neighbours[norms.argmax()][None], norms.amax()


def _norms(right: Tensor, patterns: Float[Tensor, "patterns neurons"], left: Tensor) -> Float[Tensor, " patterns"]:
    return product_norm_upper(right * patterns[:, None, :], left)


def _defect(network: Mlp, factors: list[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """prod (n_k + e_k) - prod n_k, rounded up, summed without a subtraction."""
    without, defect = network.x.new_ones(()), network.x.new_zeros(())
    for weight, (a, b) in zip(network.weights, factors, strict=True):
        rounding = 2 * gamma(b.shape[0] + weight.numel() + 8) * vector_norm(a.flatten()) * vector_norm(b.flatten())
        error = inflate(vector_norm((weight - a @ b).flatten()) + rounding, weight.numel() + 8)
        norm = product_norm_upper(a, b)
        defect = inflate(defect * (norm + error) + without * error, 4)
        without = inflate(without * norm, 2)
    return defect
