"""What capture refuses: blocks that `Attention` cannot express, and inputs it cannot work with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import capture, fused
from lipbounds.errors import InvalidInput, Unsupported
from verify.unit.capture_models import (
    DIM,
    HEADS,
    TRIANGLE,
    Addmm,
    Change,
    Changed,
    Convolution,
    Fused,
    Separate,
    WrittenOut,
    multi_head,
    run,
    tokens,
)
from verify.unit.capture_models import float64_and_seed as float64_and_seed


def in_place(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q *= 0.5
    return q, k, v


class TwoProjections(Fused):
    def __init__(self) -> None:
        super().__init__(after=lambda o: (self.proj(o), o)[1])


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in place": (lambda: Fused(change=in_place), "modified in place by torch.Tensor.mul_"),
    "normalised": (
        lambda: Fused(change=lambda q, k, v: (F.normalize(q), k, v)),
        "queries.*got torch.nn.functional.normalize",
    ),
    "keys shifted": (lambda: Fused(change=lambda q, k, v: (q, k + 1, v)), "keys.*got torch.Tensor.add"),
    "cached": (
        lambda: Fused(change=lambda q, k, v: (q, torch.cat([k, k], -2), torch.cat([v, v], -2))),
        "used once",
    ),
    "tokens mixed": (lambda: Fused(change=lambda q, k, v: (q.mT.reshape(q.shape), k, v)), "features of one token"),
    "tokens repeated": (lambda: Fused(change=lambda q, k, v: (q[:, :, :1].expand(q.shape), k, v)), "used once"),
    "keys turned": (lambda: Fused(change=lambda q, k, v: (q, k.flip(-2), v.flip(-2))), "same tokens"),
    "tokens changed": (lambda: Changed("tokens"), "result of .*linear, modified in place"),
    "projection changed": (lambda: Changed("view of projection"), "queries.*modified in place"),
    "view changed": (lambda: Changed("view of queries"), "queries.*modified in place"),
    "output changed": (lambda: Changed("output"), "the output must go into a linear projection"),
    "bytes": (lambda: Fused(change=lambda q, k, v: (q.view(torch.int64).view(q.dtype), k, v)), "got torch.Tensor.view"),
    "factor of a bias": (lambda: Addmm(), "got torch.addmm"),
    "some keys": (lambda: Fused(change=lambda q, k, v: (q, k[:, :, :3], v[:, :, :3])), "same tokens"),
    "gate": (lambda: Fused(after=lambda o: o * o.sigmoid()), "last seen going into torch.Tensor.mul"),
    "norm": (lambda: Fused(after=lambda o: F.layer_norm(o, (DIM,))), "last seen going into .*layer_norm"),
    "output mixed": (lambda: Fused(after=lambda o: o.mT.reshape(o.shape)), "all heads of one token"),
    "two projections": (TwoProjections, "a second one"),
    "other key tokens": (
        lambda: Separate(lambda x: (x, x.roll(1, -2), x), lambda t: t.repeat_interleave(2, -3)),
        "same tokens",
    ),
    "query normalised": (
        lambda: Separate(lambda x: (x / x.norm(), x, x), lambda t: t.repeat_interleave(2, -3)),
        "different functions",
    ),
    "softcap": (lambda: WrittenOut(torch.tanh), "got torch.tanh"),
    "finite fill": (lambda: WrittenOut(lambda s: s.masked_fill(~TRIANGLE, -5.0)), "at most -10000, got -5"),
    "negated": (lambda: WrittenOut(lambda s: torch.zeros(6) - s), "got torch.Tensor.sub"),
    "softmax over queries": (lambda: WrittenOut(dim=-2), "softmax must be over the keys"),
    "map changed": (
        lambda: WrittenOut(after=lambda p: p * torch.rand(6)),
        "as the softmax|got torch.Tensor.mul in between",
    ),
    "map turned": (lambda: WrittenOut(after=lambda p: p.mT), "softmax must be over the keys"),
    "map cut": (lambda: WrittenOut(after=lambda p: p[..., :3, :], product=lambda p, v: p @ v), "queries as rows"),
    "nothing": (lambda: nn.Linear(DIM, DIM), "got no such call"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_block_cannot_express_is_refused(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(Unsupported, match=message):
        run(make(), tokens())


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: x.mean(-1)[:, None, None],
        lambda x: (x.mean(-1) > -9)[:, None, None] & TRIANGLE,
        lambda x: torch.zeros(3, 1, 6, 6).masked_fill_((x > 1).any(-1)[:, None, None], -1.0),
    ],
)
def test_a_mask_computed_from_the_tokens_is_refused(mask: Change) -> None:
    """The forward pass would agree, and every bound would be about another function."""

    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, mask(x))

    with pytest.raises(Unsupported, match="mask must not depend on the tokens"):
        run(Own(), tokens())


def test_a_mask_of_multi_head_attention_computed_from_the_tokens_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = multi_head()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=(x @ x.mT).repeat_interleave(HEADS, 0))[0]

    with pytest.raises(Unsupported, match=r"'attention'.*mask or weights must not depend on the tokens"):
        run(Own(), tokens())


def test_a_window_of_several_places_is_no_projection() -> None:
    with pytest.raises(Unsupported, match=r"got torch\.nn\.functional\.conv2d"):
        run(Convolution(3), torch.randn(2, DIM, 3, 4).to(memory_format=torch.channels_last))


def test_a_mask_changed_through_a_view_is_refused() -> None:
    class Own(Fused):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.zeros(3, 1, 1, 6)
            bias[:, 0, 0].add_(x.mean(-1))
            return super().forward(x, bias)

    with pytest.raises(Unsupported, match="mask must not depend on the tokens"):
        run(Own(), tokens())


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_that_are_no_tokens_are_refused(extra: dict[str, bool]) -> None:
    x = tokens()
    with pytest.raises(Unsupported, match="must come from tokens"):
        run(multi_head(**extra), x, x, x)


def test_a_block_that_does_not_reproduce_the_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "additive", lambda mask, dtype: mask.to(dtype) * (1 + 1e-8))
    with pytest.raises(Unsupported, match="must agree with the model's to 1e-10"):
        run(Fused(), tokens(), torch.randn(6, 6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fused(change=lambda q, k, v: (F.dropout(q, 0.1), k, v)),
        lambda: Fused(after=lambda o: F.dropout(o, 0.1)),
        lambda: WrittenOut(after=lambda p: F.dropout(p, 0.1)),
        lambda: nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout=0.1),
    ],
)
def test_dropout_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(InvalidInput, match=r"call model\.eval\(\)"):
        capture(make().train(), tokens())


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_inputs_that_capture_cannot_work_with_are_refused() -> None:
    with pytest.raises(InvalidInput, match="dropout"):
        run(Fused(), tokens(), dropout_p=0.1)
    with pytest.raises(InvalidInput, match="every query must see at least one key") as caught:
        run(Fused(), tokens(), torch.zeros(6, 6, dtype=torch.bool))
    assert "while the attention in the model itself was captured" in caught.value.__notes__
    with pytest.raises(InvalidInput, match=r"model must be a torch\.nn\.Module"):
        capture(torch.relu, tokens())
    with pytest.raises(InvalidInput, match="cross_moves must be"):
        run(Fused(), tokens(), cross_moves="both")
    compiled = nn.Module()  # as torch.compile wraps it; to import the compiler would take longer than all tests here
    compiled._orig_mod = Fused()
    with pytest.raises(InvalidInput, match="must not be compiled"):
        capture(compiled, tokens())
    with torch.inference_mode(), pytest.raises(InvalidInput, match="inference_mode"):
        capture(Fused(), tokens())
    with torch.inference_mode():
        made = tokens()
    with pytest.raises(InvalidInput, match="inference_mode"):
        run(Fused(), made)
