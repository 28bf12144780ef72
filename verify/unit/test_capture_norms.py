"""QK-norm, as models write it, captured as the norms of an `Attention`, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from verify.unit.capture_hub_models import hub_inputs, hub_model
from verify.unit.capture_models import DIM, HEADS, WIDTH, Change, Fused, Separate, check_whole, close, ramp, run, tokens
from verify.unit.capture_models import float64_and_seed as float64_and_seed
from verify.unit.test_capture_rotary import both, gpt_j, llama


EPS = 1e-3
OF_HEAD = 1 + ramp(WIDTH) / 2
OF_ALL = 1 + ramp(DIM) / 2
ONES = torch.ones(HEADS, WIDTH, dtype=torch.float64)


def rms(t: Tensor, eps: float = EPS) -> Tensor:
    return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps)


def over_heads(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The norm of all heads side by side, of a tensor that has them apart."""
    return lambda t: norm(t.transpose(-3, -2).flatten(-2)).unflatten(-1, (HEADS, WIDTH)).transpose(-3, -2)


# How models normalise queries and keys, over what, and what the weights of the norm are.
NORMS: dict[str, tuple[Change, str, Tensor]] = {
    "qwen3": (both(lambda t: llama(OF_HEAD * rms(t))), "head", OF_HEAD.expand(2, 4)),
    "gemma3": (both(lambda t: llama(rms(t) * (1.0 + OF_HEAD))), "head", 1 + OF_HEAD.expand(2, 4)),
    "olmo2": (both(lambda t: llama(over_heads(lambda u: OF_ALL * rms(u))(t))), "all_heads", OF_ALL.view(2, 4)),
    "without rotary": (both(lambda t: OF_HEAD * rms(t)), "head", OF_HEAD.expand(2, 4)),
    "without weights": (both(rms), "head", ONES),
    "square": (both(lambda t: t * (EPS + t.square().mean(dim=3, keepdim=True)).rsqrt()), "head", ONES),
    "rms_norm": (both(lambda t: F.rms_norm(t, (WIDTH,), OF_HEAD, EPS)), "head", OF_HEAD.expand(2, 4)),
    "rms_norm, then rotary": (both(lambda t: llama(F.rms_norm(t, [WIDTH], eps=EPS))), "head", ONES),
    "scaled": (lambda q, k, v: (0.3 * OF_HEAD * rms(q), OF_HEAD * rms(k), v), "head", 0.3 * OF_HEAD.expand(2, 4)),
    "two weights": (both(lambda t: OF_HEAD * (OF_HEAD * rms(t))), "head", OF_HEAD.square().expand(2, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_normalised_block_has_the_output_and_the_derivative_of_the_model(name: str) -> None:
    change, over, weight = NORMS[name]
    block = check_whole(Fused(change=change), tokens()).attention
    assert (block.norm_over, block.norm_eps) == (over, EPS)
    assert block.query_norm_weight is not None
    close(block.query_norm_weight, weight)


def test_pairs_of_neighbours_take_their_weights_along() -> None:
    block = check_whole(Fused(change=both(lambda t: gpt_j(OF_HEAD * rms(t)))), tokens()).attention
    assert block.query_norm_weight is not None
    close(block.query_norm_weight, OF_HEAD[[0, 2, 1, 3]].expand(2, 4))


def test_eps_may_be_left_to_torch() -> None:
    block = check_whole(Fused(change=both(lambda t: F.rms_norm(t, (WIDTH,)))), tokens()).attention
    assert block.norm_eps == torch.finfo(torch.float64).eps


class Grouped(Separate):
    """Keys of one group; queries of all heads and keys of all groups are normalised together."""

    def __init__(self, groups: int) -> None:
        super().__init__(groups=groups)
        self.of_queries, self.of_keys = (nn.RMSNorm(width, EPS) for width in (DIM, groups * 2))
        for norm in (self.of_queries, self.of_keys):
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.of_queries(self.query(x)), self.of_keys(self.key(x)), self.value(x)
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(-3, -2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize("groups", [1, 2])  # with one group, its head is all of them
def test_grouped_keys_are_normalised_over_their_groups(groups: int) -> None:
    block = check_whole(model := Grouped(groups), tokens()).attention
    assert block.norm_over == "all_heads"
    assert block.key_norm_weight is not None
    close(block.key_norm_weight, model.of_keys.weight.detach().view(groups, 2).repeat_interleave(4 // groups, 0))


def test_gradients_reach_the_weights_of_a_norm() -> None:
    class Learned(Fused):
        def __init__(self) -> None:
            super().__init__(change=both(lambda t: llama(self.gain * rms(t))))
            self.gain = nn.Parameter(OF_HEAD)

    (found,) = capture(model := Learned(), x := tokens())
    (mine,) = torch.autograd.grad(found.attention.forward().square().sum(), model.gain)
    (true,) = torch.autograd.grad(model(x).square().sum(), model.gain)
    close(mine, true)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(("name", "over"), [("Qwen3", "head"), ("Gemma3Text", "head"), ("Olmo2", "all_heads")])
def test_models_of_transformers_are_exact_but_for_their_rounding_to_float32(
    name: str, over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = hub_model(name), hub_inputs(name)
    assert max(block.residual for block in run(model, **inputs)) < 1e-7
    plus = 1.0 if name.startswith("Gemma") else 0.0
    norm = type(model.layers[0].self_attn.q_norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: rms(x, model.config.rms_norm_eps) * (plus + self.weight))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # cosines and sines
    found = run(model, **inputs)
    assert len(found) == model.config.num_hidden_layers
    assert max(block.residual for block in found) < 1e-13
    for block, layer in zip(found, model.layers, strict=True):
        assert block.attention.norm_over == over
        assert block.attention.norm_eps == model.config.rms_norm_eps
        assert {"qk_norm", "rotary"} <= block.attention.features
        heads = 1 if over == "head" else 4
        weight = (plus + layer.self_attn.q_norm.weight.detach()).view(heads, -1).expand(4, -1)
        close(block.attention.query_norm_weight, weight)


def changing_its_mean_square(t: Tensor) -> Tensor:
    square = t.pow(2).mean(-1, keepdim=True)
    result = t * torch.rsqrt(square + EPS)
    square.mul_(2)
    return result


@pytest.mark.parametrize(
    "norm",
    [lambda t: rms(t * OF_HEAD), changing_its_mean_square, lambda t: rms(t).mul_(2), lambda t: rms(t) * OF_ALL[3]],
)
def test_changes_around_a_norm_that_weights_can_express_are_followed(norm: Change) -> None:
    check_whole(Fused(change=both(norm)), tokens())


REFUSED: dict[str, tuple[Change, str]] = {
    "queries alone": (lambda q, k, v: (rms(q), k, v), "both be normalised, got one of them alone"),
    "values": (lambda q, k, v: (rms(q), rms(k), rms(v)), "the values .* must not be normalised;"),
    "other eps": (lambda q, k, v: (rms(q), rms(k, 0.5), v), "normalised alike, got eps 0.001 and 0.5"),
    "other features": (lambda q, k, v: (rms(q), over_heads(rms)(k), v), r"normalised alike, .*'head'.*'all_heads'"),
    "half a head": (both(lambda t: rms(t.unflatten(-1, (2, 2))).flatten(-2)), "got 2 features together where a head"),
    "over tokens": (both(lambda t: rms(t.mT).mT), "features of one token must be normalised together"),
    "twice": (both(lambda t: rms(rms(t))), "normalised once|QK-norm|in between"),
    "of the other": (lambda q, k, v: (q * (k / rms(k)), k, v), "QK-norm|must not depend|in between"),
    "root of another": (both(lambda t: t * torch.rsqrt((2 * t).pow(2).mean(-1, keepdim=True) + 1)), "QK-norm"),
    "sum": (
        both(lambda t: t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1)),
        "factors computed from them; .*QK-norm",
    ),
    "cubes": (both(lambda t: t * torch.rsqrt(t.pow(4).mean(-1, keepdim=True) + 1)), "QK-norm"),
    "over rows": (both(lambda t: t * torch.rsqrt(t.pow(2).mean(-2, keepdim=True) + 1)), "QK-norm"),
    "no eps": (both(lambda t: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True))), "QK-norm"),
    "eps of the tokens": (
        both(lambda t: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + t[..., :1].abs())),
        "QK-norm",
    ),
    "weights by position": (both(lambda t: rms(t) * torch.arange(1.0, 7.0)[:, None]), "same number for all tokens"),
    "weights of the tokens": (both(lambda t: rms(t) * t[0, 0, 0]), "factors computed from them|must not depend"),
    "two dimensions": (both(lambda t: F.rms_norm(t, t.shape[-2:])), "rms_norm must be over one dimension"),
    "mean taken off": (both(lambda t: rms(t - t.mean(-1, keepdim=True))), "in between"),
    "turned before": (both(lambda t: rms(llama(t))), "in between"),
    "shifted": (both(lambda t: rms(t) + OF_HEAD), "in between"),
    "layer_norm": (both(lambda t: F.layer_norm(t, (WIDTH,))), r"got torch\.nn\.functional\.layer_norm .*QK-norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_root_mean_square_norm_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(Unsupported, match=message):
        run(Fused(change=change), tokens())


def test_a_root_of_one_entry_is_no_constant() -> None:
    check_whole(Fused(change=both(over_heads(rms))), tokens(1, 1))
