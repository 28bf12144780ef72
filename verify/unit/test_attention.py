"""Attention equals PyTorch's own modules, its Jacobian products equal autograd's, and bad blocks are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lipbounds import Attention, InvalidInput
from verify.unit.blocks import random_block


def memory(m: int, dim: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(m, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"biases": False},
    "biases": {},
    "causal": {"causal": True},
    "logit bias": {"logit_bias": torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)},
    "negative scale": {"scale": -0.7},
    "query moves": {"memory": memory(3, 6), "moves": "query"},
    "memory moves": {"memory": memory(3, 6), "moves": "memory"},
    "batch": {"x": memory(2 * 3 * 4, 6).reshape(2, 3, 4, 6)},
    "batched weights": {
        "w_v": memory(5 * 2 * 6, 3).reshape(5, 2, 6, 3),
        "w_k": memory(5 * 2 * 6, 3).reshape(5, 2, 6, 3),
    },
}
VARIANTS["batched weights"] |= {
    "w_q": memory(5 * 2 * 6, 3, 1).reshape(5, 2, 6, 3),
    "w_o": memory(5 * 2 * 3, 6, 2).reshape(5, 2, 3, 6),
    "biases": False,
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(**VARIANTS[request.param])


def test_forward_is_the_plain_function(block: Attention) -> None:
    torch.testing.assert_close(block.function()(block.moving_input), block.forward(), rtol=1e-12, atol=1e-12)
    assert block.forward().shape[:-2] == block.batch_shape


def test_jacobian_products_equal_automatic_differentiation(block: Attention) -> None:
    generator = torch.Generator().manual_seed(1)
    tangent = torch.randn(block.moving_input.shape, generator=generator, dtype=torch.float64)
    output, expected = torch.func.jvp(block.function(), (block.moving_input,), (tangent,))
    torch.testing.assert_close(block.jvp(tangent), expected, rtol=1e-10, atol=1e-10)
    if block.batch_shape != block.moving_input.shape[:-2]:
        return  # one input under many weights: autograd sums over them, vjp keeps them apart
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.func.vjp(block.function(), block.moving_input)[1](cotangent)
    torch.testing.assert_close(block.vjp(cotangent), expected, rtol=1e-10, atol=1e-10)


def test_vjp_is_the_transpose_of_jvp(block: Attention) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (*block.batch_shape, *block.moving_input.shape[-2:])
    tangent = torch.randn(shape, generator=generator, dtype=torch.float64)
    image = block.jvp(tangent)
    cotangent = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    left = (image * cotangent).sum((-2, -1))
    torch.testing.assert_close((tangent * block.vjp(cotangent)).sum((-2, -1)), left, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_multihead_attention(causal: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    x = memory(4, 6)[None]
    q, k, v = module.in_proj_weight.detach().chunk(3)
    b_q, b_k, b_v = module.in_proj_bias.detach().chunk(3)

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return weight.mT.reshape(6, 2, 3).transpose(0, 1)

    block = Attention(
        x=x,
        w_q=heads(q),
        w_k=heads(k),
        w_v=heads(v),
        w_o=module.out_proj.weight.detach().mT.reshape(2, 3, 6),
        b_q=b_q.reshape(2, 3),
        b_k=b_k.reshape(2, 3),
        b_v=b_v.reshape(2, 3),
        b_o=module.out_proj.bias.detach(),
        causal=causal,
    )
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64) if causal else None
    expected = module(x, x, x, attn_mask=mask, is_causal=causal, need_weights=False)[0]
    torch.testing.assert_close(block.forward(), expected, rtol=1e-10, atol=1e-10)


def test_grouped_query_heads_repeat_keys_and_values() -> None:
    full = random_block(heads=4, dim=8)
    grouped = full.replace(w_k=full.w_k[:2], w_v=full.w_v[:2], b_k=full.b_k[:2], b_v=full.b_v[:2])
    by_hand = full.replace(
        **{name: getattr(full, name)[[0, 0, 1, 1]] for name in ("w_k", "w_v", "b_k", "b_v")},
    )
    assert torch.equal(grouped.forward(), by_hand.forward())


def test_features_name_what_a_bound_must_support() -> None:
    assert random_block(heads=1, biases=False).features == frozenset()
    assert random_block(heads=1, biases=False, b_q=torch.zeros(1, 6, dtype=torch.float64)).features == frozenset()
    assert random_block(causal=True).features == {"heads", "biases", "mask"}
    assert random_block(memory=memory(3, 6), moves="query").features == {"heads", "biases", "cross"}


def test_to_and_at_keep_the_rest() -> None:
    block = random_block(causal=True)
    assert block.to(torch.float32).double.dtype == torch.float64
    moved = block.at(block.x + 1)
    assert torch.equal(moved.x, block.x + 1)
    assert moved.causal
    cross = random_block(memory=memory(3, 6), moves="memory")
    assert torch.equal(cross.at(cross.source_input * 2).memory, cross.source_input * 2)


NAN = torch.full((4, 6), float("nan"), dtype=torch.float64)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "integer input": ({"x": torch.ones(4, 6, dtype=torch.int64)}, "x must have one of the dtypes"),
    "boolean mask": ({"logit_bias": torch.ones(4, 4, dtype=torch.bool)}, "turn a boolean mask into 0 and -inf"),
    "not a tensor": ({"w_q": [1.0]}, "w_q must be a torch tensor, got list"),
    "one dimension": ({"x": torch.ones(6, dtype=torch.float64)}, "x must have at least 2 dimensions"),
    "no head dimension": ({"w_q": torch.ones(6, 3, dtype=torch.float64)}, "w_q must have at least 3 dimensions"),
    "mixed dtypes": ({"w_k": torch.ones(2, 6, 3)}, "share one dtype, got x=torch.float64 and w_k=torch.float32"),
    "width": ({"x": torch.ones(4, 5, dtype=torch.float64)}, r"x must end in the shape \(4, 6\)"),
    "key width": ({"w_k": torch.ones(2, 6, 2, dtype=torch.float64)}, "w_k must end in the shape"),
    "bias width": ({"b_q": torch.ones(2, 4, dtype=torch.float64)}, "b_q must end in the shape"),
    "output heads": ({"w_o": torch.ones(3, 3, 6, dtype=torch.float64)}, "w_o must end in the shape"),
    "groups": (
        {"w_k": torch.ones(3, 6, 3, dtype=torch.float64), "w_v": torch.ones(3, 6, 3, dtype=torch.float64)},
        "divide",
    ),
    "no tokens": ({"x": torch.ones(0, 6, dtype=torch.float64)}, "at least one token"),
    "mask shape": (
        {"logit_bias": torch.zeros(3, 4, dtype=torch.float64)},
        r"logit_bias must broadcast to .* \(2, 4, 4\)",
    ),
    "nan input": ({"x": NAN}, "x must be finite, got 24 of 24"),
    "infinite weights": ({"w_v": torch.full((2, 6, 3), torch.inf, dtype=torch.float64)}, "w_v must be finite"),
    "nan mask": ({"logit_bias": NAN[:, :4]}, "logit_bias must be finite or -inf"),
    "plus infinity mask": ({"logit_bias": torch.full((4, 4), torch.inf, dtype=torch.float64)}, "finite or -inf"),
    "masked row": ({"logit_bias": torch.full((4, 4), -torch.inf, dtype=torch.float64)}, "fully masked"),
    "infinite scale": ({"scale": float("inf")}, "scale must be finite"),
    "moves without memory": ({"moves": "query"}, "moves must be one of"),
    "memory without moves": ({"memory": memory(3, 6)}, "moves must be one of"),
    "causal cross": ({"memory": memory(3, 6), "moves": "query", "causal": True}, "no single convention"),
    "batches": (
        {"x": torch.ones(2, 4, 6, dtype=torch.float64), "logit_bias": torch.zeros(3, 1, 4, 4).double()},
        "leading",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_blocks_get_one_clear_error(case: str, as_a_user_runs_it: None) -> None:
    fields, message = BAD[case]
    with pytest.raises(InvalidInput, match=message):
        random_block(**fields)


def test_a_causal_mask_joins_a_padding_mask_before_the_check() -> None:
    """Each mask alone leaves a key to every query; together they do not."""
    hide_first = torch.zeros(4, 4, dtype=torch.float64)
    hide_first[:, 0] = -torch.inf
    with pytest.raises(InvalidInput, match="1 fully masked"):
        random_block(causal=True, logit_bias=hide_first)


def test_other_device_is_refused() -> None:
    with pytest.raises(InvalidInput, match="one device"):
        random_block(w_q=torch.ones(2, 6, 3, dtype=torch.float64, device="meta"))
