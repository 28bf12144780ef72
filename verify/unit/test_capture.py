"""Captured attention blocks against the models they come from: values, derivatives, weights, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from verify.unit.capture_models import (
    DIM,
    HEADS,
    TRIANGLE,
    WIDTH,
    Convolution,
    Fused,
    Separate,
    WrittenOut,
    check_whole,
    close,
    multi_head,
    ramp,
    run,
    tokens,
)
from verify.unit.capture_models import float64_and_seed as float64_and_seed


# -- one block: values and derivatives ------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fused": (lambda: Fused("3hd"), (3, 6)),
    "fused, heads first": (lambda: Fused("h3d"), (3, 6)),
    "fused, width first": (lambda: Fused("dh3"), (3, 6)),
    "no batch": (lambda: Fused("3hd"), (6,)),
    "two batch dimensions": (lambda: Fused("3hd"), (2, 3, 6)),
    "scaled": (lambda: Fused(change=lambda q, k, v: (q * 0.3, 2 * k, v / 5), after=lambda o: o * 0.7), (3, 6)),
    "copied": (lambda: Fused(change=lambda q, k, v: (q.contiguous().clone(), k, v.contiguous())), (3, 6)),
    "empty cache": (lambda: Fused(change=lambda q, k, v: (q, torch.cat([torch.tensor([]), k], -2), v)), (3, 6)),
    "grouped": (lambda: Separate(), (3, 6)),
    "grouped, repeated": (lambda: Separate(repeat=lambda t: t.repeat_interleave(2, -3)), (3, 6)),
    "grouped, expanded": (
        lambda: Separate(repeat=lambda t: t[:, :, None].expand(3, 2, 2, 6, 2).reshape(3, 4, 6, 2)),
        (3, 6),
    ),
    "one group": (lambda: Separate(groups=1, repeat=lambda t: t.expand(3, 4, 6, 2)), (3, 6)),
    "written out": (WrittenOut, (3, 6)),
    "written out, no batch": (WrittenOut, (6,)),
    "mask added": (lambda: WrittenOut(lambda s: (s + 3 * torch.arange(6.0)) * 0.5), (3, 6)),
    "mask subtracted": (lambda: WrittenOut(lambda s: s - torch.arange(6.0)), (3, 6)),
    "mask of -inf": (lambda: WrittenOut(lambda s: torch.where(TRIANGLE, s, -torch.inf)), (3, 6)),
    "mask filled": (lambda: WrittenOut(lambda s: s.masked_fill(~TRIANGLE, torch.finfo(s.dtype).min)), (3, 6)),
    "heads in the batch": (lambda: WrittenOut(lambda s: s.flatten(0, 1), lambda p: p.unflatten(0, (3, 2))), (3, 6)),
    "multi-head": (multi_head, (3, 6)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_the_output_and_the_derivative_of_the_model(name: str) -> None:
    make, shape = BLOCKS[name]
    x = tokens(*shape)
    found = check_whole(make(), *([x] * 3 if name == "multi-head" else [x]))
    assert found.attention.x.equal(x)
    assert found.attention.memory is None
    assert (found.module, found.index) == ("", 0)


def test_channels_of_a_convolution_are_features() -> None:
    image = torch.randn(2, DIM, 3, 4).to(memory_format=torch.channels_last)
    (found,) = run(model := Convolution(), image)
    assert found.attention.x.equal(image.flatten(2).mT)
    close(found.attention.forward(), model(image).flatten(2).mT)


def test_heads_and_biases_are_those_of_the_weight_rows() -> None:
    (found,) = run(model := Fused("3hd"), tokens())
    block, weight, bias = (
        found.attention,
        model.qkv.weight.view(3, HEADS, WIDTH, DIM),
        model.qkv.bias.view(3, HEADS, WIDTH),
    )
    assert all(w.equal(weight[i].mT) for i, w in enumerate((block.w_q, block.w_k, block.w_v)))
    assert all(b.equal(bias[i]) for i, b in enumerate((block.b_q, block.b_k, block.b_v)))
    assert block.w_o.equal(model.proj.weight.mT.view(HEADS, WIDTH, DIM))
    assert block.b_o.equal(model.proj.bias)
    assert block.scale == WIDTH**-0.5


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (TRIANGLE, (6, 6)),
        (torch.zeros(6, 6, dtype=torch.float64).masked_fill(~TRIANGLE, torch.finfo(torch.float64).min), (6, 6)),
        (ramp(6, 6), (6, 6)),
        (torch.ones(6, 6, dtype=torch.bool), None),
        (0 * ramp(3, 1, 6, 6), None),
        (ramp(3, 1, 1, 6), (3, 1, 6, 6)),
        (ramp(3, 1, 1, 6).expand(3, 2, 6, 6), (3, 1, 6, 6)),
        (ramp(2, 1, 6), (2, 6, 6)),
        (ramp(3, 2, 6, 6), (3, 2, 6, 6)),
    ],
)
def test_a_mask_becomes_a_logit_bias_no_larger_than_needed(mask: Tensor, shape: tuple[int, ...] | None) -> None:
    bias = check_whole(Fused(), tokens(), mask=mask).attention.logit_bias
    assert shape == (None if bias is None else tuple(bias.shape))
    if bias is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask < -2
        assert bool((bias.isneginf() == hidden).all())


def test_a_causal_call_stays_causal_and_a_rectangular_one_becomes_a_mask() -> None:
    assert check_whole(Fused(), tokens(), is_causal=True).attention.causal
    crossed = Separate(lambda x, y: (x, y, y), lambda t: t.repeat_interleave(2, -3))
    block = check_whole(crossed, tokens(), tokens(3, 7)).attention
    assert block.logit_bias is not None
    assert block.logit_bias.isneginf().equal(torch.ones(6, 7, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("scale", [None, 0.9])
def test_the_scale_of_the_call_is_the_scale_of_the_block(scale: float | None) -> None:
    assert check_whole(Fused(), tokens(), scale=scale).attention.scale == (scale or WIDTH**-0.5)


def test_a_mask_with_only_the_shape_and_dtype_of_the_tokens_is_accepted() -> None:
    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x.new_zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf))

    assert check_whole(Own(), tokens()).attention.logit_bias.isneginf().equal(~TRIANGLE)


def test_a_mask_computed_from_the_ids_of_the_tokens_is_accepted() -> None:
    """Ids cannot move by a little, unlike the tokens that are looked up by them."""

    class Own(Fused):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(F.embedding(ids, self.proj.weight), (ids != 0)[:, None, None])

    (found,) = run(Own(), torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]))
    assert found.attention.logit_bias.isneginf().sum((-1, -2)).flatten().tolist() == [4, 8]


def test_a_logit_overwritten_by_a_large_number_is_hidden() -> None:
    block = check_whole(WrittenOut(lambda s: s.masked_fill(~TRIANGLE, -1e9)), tokens()).attention
    assert block.logit_bias.isneginf().equal(~TRIANGLE)


def test_probabilities_may_weigh_the_rows_of_a_parameter() -> None:
    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1) @ self.proj.weight

    assert len(run(Own(), tokens())) == 1


def test_a_module_that_failed_is_not_taken_for_running() -> None:
    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.proj(x[..., :1])
            return super().forward(x)

    assert run(Own(), tokens())[0].module == ""


# -- nn.MultiheadAttention and its layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("cross_moves", ["query", "memory"])
@pytest.mark.parametrize("features", [DIM, 5])
def test_cross_attention_has_a_memory_and_moves_as_asked(cross_moves: str, features: int) -> None:
    x, y = tokens(), torch.randn(3, 7, features)
    found = check_whole(multi_head(kdim=features, vdim=features), x, y, y, cross_moves=cross_moves)
    assert found.attention.moves == cross_moves
    assert found.attention.memory is not None
    assert found.attention.memory.equal(y)


def test_different_keys_and_values_stand_side_by_side_if_the_query_moves() -> None:
    x, key, value = tokens(), torch.randn(3, 7, 5), torch.randn(3, 7, 4)
    assert check_whole(multi_head(kdim=5, vdim=4), x, key, value).attention.memory.equal(torch.cat([key, value], -1))
    with pytest.raises(Unsupported, match="no one input moves"):
        run(multi_head(kdim=5, vdim=4), x, key, value, cross_moves="memory")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": ~TRIANGLE},
        {"attn_mask": ~TRIANGLE, "is_causal": True},
        {"attn_mask": ramp(6, 6, 6)},
        {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [2]])},
        {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [2]]), "attn_mask": ~TRIANGLE},
    ],
)
def test_masks_of_multi_head_attention_hide_what_is_true(options: dict[str, Any], need_weights: bool) -> None:
    x = tokens()
    block = check_whole(multi_head(), x, x, x, **options, need_weights=need_weights).attention
    assert block.causal == ("is_causal" in options and not need_weights)


@pytest.mark.parametrize("separate", [True, False])
def test_the_functional_form_takes_boolean_masks(separate: bool) -> None:
    """The module turns its masks into floats before it calls the function."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = multi_head()

        def forward(self, x: Tensor) -> Tensor:
            q_k_v = dict(
                zip(
                    ("q_proj_weight", "k_proj_weight", "v_proj_weight"), self.layer.in_proj_weight.chunk(3), strict=True
                )
            )
            weights = q_k_v | {"use_separate_proj_weight": True} if separate else {}
            seen = F.multi_head_attention_forward(
                *(x, x, x, DIM, HEADS, None if separate else self.layer.in_proj_weight, self.layer.in_proj_bias),
                *(None, None, False, 0.0, self.layer.out_proj.weight, self.layer.out_proj.bias),
                **weights,
                attn_mask=~TRIANGLE,
                key_padding_mask=torch.arange(6) >= torch.tensor([[6], [4], [2]]),
            )
            return seen[0]

    x = tokens(6, 3)
    (found,) = run(model := Own(), x)
    close(found.attention.forward().transpose(0, 1), model(x))
    assert found.attention.logit_bias.isneginf()[0, 0].equal(~TRIANGLE)


def test_multi_head_attention_takes_tokens_first_or_no_batch() -> None:
    model = multi_head(batch_first=False, bias=False)
    x = tokens(6, 3)
    (found,) = run(model, x, x, x)
    close(found.attention.forward().transpose(0, 1), model(x, x, x)[0])
    x = tokens(6)
    check_whole(model, x, x, x, attn_mask=torch.randn(2, 6, 6))


@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layers_are_seen_in_spite_of_the_fast_path(grad: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 16, batch_first=True), 3).eval()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    with torch.set_grad_enabled(grad):
        found = capture(encoder, tokens(), src_key_padding_mask=padding)
    assert [(block.module, block.index) for block in found] == [(f"layers.{i}.self_attn", i) for i in range(3)]
    assert found[2].attention.w_q.requires_grad == grad
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_decoder_gives_self_and_cross_attention_in_turn() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 16, batch_first=True), 2)
    found = run(decoder, tokens(), tokens(3, 5))
    assert [block.module.split(".")[-1] for block in found] == ["self_attn", "multihead_attn"] * 2
    assert [block.attention.moves for block in found] == ["self", "query"] * 2


# -- gradients, copies, clean-up ------------------------------------------------------------------------------------


def test_gradients_reach_the_weights_of_the_model_if_they_are_on() -> None:
    model = Fused(change=lambda q, k, v: (q * 0.3, k, v))
    (found,) = capture(model, x := tokens().requires_grad_())
    found.attention.forward().square().sum().backward()
    through_block = [p.grad.clone() for p in (model.qkv.weight, model.qkv.bias, model.proj.weight, model.proj.bias, x)]
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward()
    for mine, true in zip(
        through_block, (model.qkv.weight, model.qkv.bias, model.proj.weight, model.proj.bias, x), strict=True
    ):
        close(mine, true.grad)
    assert not run(model, x)[0].attention.x.requires_grad


@pytest.mark.parametrize("fused_layer", [True, False])
def test_later_changes_in_place_do_not_reach_the_block(fused_layer: bool) -> None:
    class Residual(Fused):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x, bias := torch.randn(6, 6))
            output += x
            x += 1
            bias += 1
            return output

    class ResidualMultiHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = multi_head()

        def forward(self, x: Tensor) -> Tensor:
            output = self.layer(x, x, x)[0]
            x += 1
            return output

    x = tokens()
    (found,) = run(model := (ResidualMultiHead if fused_layer else Residual)(), x.clone())
    saved = found.attention.forward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert found.attention.x.equal(x)
    close(found.attention.replace().forward(), saved)


def test_hooks_and_the_fast_path_are_as_before_even_after_an_error() -> None:
    model = Fused(change=lambda q, k, v: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tokens())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run(Fused(), tokens())
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("causal", [False, True])
def test_some_queries_keep_their_mask(causal: bool) -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Fused(change=lambda q, k, v: (q[..., [4, 1], :], k, v))

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, **({"is_causal": True} if causal else {"mask": ramp(2, 6)}))

    found = check_whole(Some(), tokens())
    assert found.attention.queries_at.tolist() == [4, 1]  # pyright: ignore[reportOptionalMemberAccess]
    assert found.attention.logit_bias is not None  # causal: of the first two places, as torch has it


def test_multi_head_attention_of_some_queries() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, :1], x, x, need_weights=False)[0]

    found = check_whole(Some(), tokens())
    assert found.attention.queries_at.tolist() == [0]  # pyright: ignore[reportOptionalMemberAccess]


def test_queries_of_tokens_that_are_no_keys_are_refused() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(self.q(x[:, :1]), self.k(x[:, 1:]), self.v(x[:, 1:])))

    with pytest.raises(Unsupported, match="the same tokens in another order or number"):
        run(Other(), tokens())
