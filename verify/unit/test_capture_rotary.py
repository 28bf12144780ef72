"""Rotary positions, as models write them, captured as the rotations of an `Attention`, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from verify.unit.capture_models import DIM, HEADS, WIDTH, Change, Fused, Separate, check_whole, close, run, tokens
from verify.unit.capture_models import float64_and_seed as float64_and_seed


ANGLES = torch.arange(6.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
COS, SIN = ANGLES.cos().repeat(1, 2), ANGLES.sin().repeat(1, 2)


def half(t: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return torch.cat([-second, first], -1)


def llama(t: Tensor, cos: Tensor = COS, sin: Tensor = SIN) -> Tensor:
    return t * cos + half(t) * sin


def llama_in_short(t: Tensor) -> Tensor:
    (first, second), cos, sin = t.chunk(2, -1), COS[:, :2], SIN[:, :2]
    return torch.cat([first * cos - second * sin, cos * second + sin * first], -1)


def gpt_j(t: Tensor) -> Tensor:
    cos, sin = ANGLES.cos().repeat_interleave(2, -1), ANGLES.sin().repeat_interleave(2, -1)
    return t * cos + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * sin


def complex_numbers(t: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(6, 2, dtype=torch.float64), ANGLES)
    return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def some_features(t: Tensor) -> Tensor:
    return torch.cat([llama(t[..., :2], COS[:, ::2], SIN[:, ::2]), t[..., 2:]], -1)


def some_tokens(t: Tensor) -> Tensor:
    return torch.cat([t[..., :2, :], llama(t[..., 2:, :], COS[2:], SIN[2:])], -2)


def at_angles(t: Tensor, angles: Tensor) -> Tensor:
    return llama(t, *(torch.cat([part, part], -1) for part in (angles.cos(), angles.sin())))


def both(turn: Change) -> Change:
    return lambda q, k, v: (turn(q), turn(k), v)


# How models turn queries and keys, and the number of pairs of features that are turned.
TURNS: dict[str, tuple[Change, int]] = {
    "llama": (llama, 2),
    "llama in short": (llama_in_short, 2),
    "gpt-j": (gpt_j, 2),
    "complex numbers": (complex_numbers, 2),
    "some features": (some_features, 1),
    "some tokens": (some_tokens, 2),
    "other direction": (lambda t: llama(t, COS, -SIN), 2),
    "scaled": (lambda t: llama(t * 0.3, 1.7 * COS, 1.7 * SIN) / 2, 2),
    "some features, scaled": (lambda t: 0.9 * some_features(t) / torch.tensor([1.0, 1.0, 2.0, 3.0]), 1),
    "items at places of their own": (lambda t: at_angles(t, ANGLES + torch.tensor([0.0, 1, 5]).view(3, 1, 1, 1)), 2),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_block_has_the_output_and_the_derivative_of_the_model(name: str) -> None:
    turn, pairs = TURNS[name]
    block = check_whole(Fused(change=both(turn)), tokens()).attention
    assert block.query_rotation is not None
    assert block.key_rotation is not None
    assert block.query_rotation.equal(block.key_rotation)
    items = (3,) if name == "items at places of their own" else ()
    assert block.query_rotation.shape == (*items, 6, 2, pairs)
    close(block.query_rotation.square().sum(-2), torch.ones(*items, 6, pairs))


def test_rotations_are_the_models_own_cosines_and_sines_and_weights_stay_as_they_are() -> None:
    (found,) = run(model := Fused(change=both(llama)), tokens())
    weight = model.qkv.weight.view(3, HEADS, WIDTH, DIM)
    assert found.attention.query_rotation.equal(torch.stack([ANGLES.cos(), ANGLES.sin()], -2))
    assert found.attention.w_q.equal(weight[0].mT)
    assert found.attention.w_k.equal(weight[1].mT)


def test_queries_and_memory_may_have_rotations_of_their_own() -> None:
    class Cross(Separate):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (
                layer(source).unflatten(-1, (-1, 2)).transpose(-3, -2)
                for layer, source in ((self.query, x), (self.key, y), (self.value, y))
            )
            q, k = llama(q, COS[:, 1::2], SIN[:, 1::2]), llama(k, COS[:5, 1::2], SIN[:5, 1::2])
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(mixed.transpose(-3, -2).flatten(-2))

    for moves in ("query", "memory"):
        block = check_whole(Cross(), tokens(), tokens(3, 5), cross_moves=moves).attention
        assert block.key_rotation.shape == (5, 2, 1)
        assert block.moves == moves


def test_positions_that_are_no_buffer_may_be_shared_by_blocks() -> None:
    """The tokens of the second block were computed with the cosines of the first."""
    model = nn.Sequential(Fused(change=both(llama)), Fused(change=both(llama)))
    assert [block.attention.query_rotation.shape for block in run(model, tokens())] == [(6, 2, 2)] * 2


def test_gradients_reach_the_angles_of_learned_positions() -> None:
    class Learned(Fused):
        def __init__(self) -> None:
            super().__init__(change=both(lambda t: at_angles(t, self.angles)))
            self.angles = nn.Parameter(ANGLES)

    (found,) = capture(model := Learned(), x := tokens())
    (mine,) = torch.autograd.grad(found.attention.forward().square().sum(), model.angles)
    (true,) = torch.autograd.grad(model(x).square().sum(), model.angles)
    close(mine, true)


@pytest.mark.parametrize(
    "turn",
    [lambda t: torch.cat([t[..., :1] + t[..., 1:2], t[..., 1:]], -1), lambda t: llama(t.clone().mul_(2))],
)
def test_changes_that_weights_can_express_are_followed(turn: Change) -> None:
    check_whole(Fused(change=both(turn)), tokens())


REFUSED: dict[str, tuple[Change, str]] = {
    "queries alone": (lambda q, k, v: (llama(q), k, v), "queries and keys must be turned in the same pairs"),
    "in other pairs": (lambda q, k, v: (llama(q), gpt_j(k), v), "queries and keys must be turned in the same pairs"),
    "values": (lambda q, k, v: (llama(q), llama(k), llama(v)), "the values .* must not be turned"),
    "heads apart": (both(lambda t: at_angles(t, ANGLES * torch.tensor([1.0, 2]).view(2, 1, 1))), "same for all heads"),
    "reflection": (both(lambda t: t * COS + t.roll(2, -1) * SIN), "must be multiplied by a rotation"),
    "three features": (both(lambda t: t * COS + t.roll(1, -1) * SIN + t.roll(2, -1)), "at most two"),
    "scaled by position": (both(lambda t: llama(t) * torch.arange(1.0, 7.0)[:, None]), "same number for all tokens"),
    "scaled, not turned": (both(lambda t: t * torch.arange(1.0, 7.0)[:, None]), "same number for all tokens"),
    "tokens added": (both(lambda t: t + t.roll(1, -2)), "features of one token"),
    "layer_norm": (
        both(lambda t: llama(F.layer_norm(t, (WIDTH,)))),
        r"got torch\.nn\.functional\.layer_norm .*QK-norm",
    ),
    "rounded": (both(lambda t: llama(t.to(torch.int64).to(t.dtype))), r"got torch\.Tensor\.to in between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rotation_by_positions_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(Unsupported, match=message):
        run(Fused(change=change), tokens())


def test_angles_that_depend_on_the_tokens_are_refused() -> None:
    """The forward pass would agree, and every bound would be about another function."""

    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            angles = ANGLES * x.mean((-1, -2)).view(-1, 1, 1, 1)
            self.change = both(lambda t: at_angles(t, angles))
            return super().forward(x)

    with pytest.raises(Unsupported, match="rotary positions must not depend on the tokens"):
        run(Own(), tokens())


def test_positions_may_be_cast_like_the_tokens() -> None:
    """The dtype of a tensor is no value of it."""
    check_whole(Fused(change=both(lambda t: llama(t, COS.float().type_as(t), SIN.float().to(t)))), tokens())
