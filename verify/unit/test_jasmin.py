"""JaSMin: values in high precision, gradients at one-hot, uniform and tied rows, and every way a model attends."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import strategies as st
from mpmath import mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipbounds import InvalidInput, Unsupported
from lipbounds.capture import capture
from lipbounds.jasmin import JaSMin, jasmin, jasmin_of
from lipbounds.models.digits_vit import DigitsViT
from lipbounds.ops import log_g
from lipbounds.ops.log_g import log_g_1, log_g_ratio, scores


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_log_g(row: list[float], k: int) -> float:
    """log g_k of softmax(row) in 80 digits."""
    with mp.workdps(80):
        weights = sorted((mp.exp(mp.mpf(v)) for v in row if v > -math.inf), reverse=True)
        weights.append(mp.mpf(0))
        complement = mp.fsum(weights[: k - 1] + weights[k:]) + weights[k]  # 1 - p_(k) + p_(k+1), times the sum
        return float(mp.log(weights[k - 1] * complement / mp.fsum(weights) ** 2))


ROWS = {
    "ordinary": [0.3, -1.2, 2.0, 0.7, -0.1],
    "uniform": [1.5] * 5,
    "one-hot": [80.0, 0.0, -1.0, 2.0, 0.5],
    "extreme": [5000.0, 0.0, -1.0, -4000.0, 0.5],
    "two tied": [3.0, 3.0, -1.0, 0.0, -2.0],
    "tied and one-hot": [50.0, 50.0, -1.0, 0.0, 0.0],
    "masked": [0.3, -math.inf, 2.0, -math.inf, -0.1],
    "two visible": [-math.inf, 0.2, -math.inf, 0.9, -math.inf],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_values_are_those_of_the_formula(name: str, k: int) -> None:
    row = ROWS[name]
    logits = torch.tensor(row, dtype=torch.float64)
    rank = min(k, sum(entry > -math.inf for entry in row))
    first, other = exact_log_g(row, 1), exact_log_g(row, rank)
    assert float(log_g_1(logits)) == pytest.approx(first, rel=1e-13, abs=1e-14)
    assert float(log_g_ratio(logits, k)) == pytest.approx(first - other, rel=1e-13, abs=1e-12)
    assert float(scores(logits.clone(), 0)) == pytest.approx(first, rel=1e-13, abs=1e-14)
    assert float(scores(logits.clone(), k)) == pytest.approx(first - other, rel=1e-13, abs=1e-12)


@hypothesis.given(
    row=st.lists(st.floats(-60, 60) | st.integers(-3, 3).map(float), min_size=2, max_size=14), k=st.integers(1, 12)
)
def test_the_ratio_is_never_negative_and_grows_with_k(row: list[float], k: int) -> None:
    logits = torch.tensor(row, dtype=torch.float64)
    found = float(log_g_ratio(logits, k))
    assert found >= -1e-12
    assert found <= float(log_g_ratio(logits, k + 1)) + 1e-12
    rank = min(k, len(row))
    assert found == pytest.approx(exact_log_g(row, 1) - exact_log_g(row, rank), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("k", [0, 1, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("over_rows", ["max", "mean"])
def test_gradcheck(k: int, scale: float, over_rows: Any) -> None:
    logits = draw(2, 3, 4, 6, seed=k, scale=scale)
    logits[:, :, 1, 3:] = -torch.inf
    logits[:, :, 2, 1:] = -torch.inf
    visible = logits.isfinite()

    def penalty(entries: Tensor) -> Tensor:
        return jasmin(torch.full_like(logits, -torch.inf).masked_scatter(visible, entries), k=k, over_rows=over_rows)

    assert torch.autograd.gradcheck(penalty, logits[visible].requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [0, 1, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_finite_everywhere(name: str, k: int, dtype: torch.dtype) -> None:
    logits = torch.tensor([[ROWS[name], ROWS["one-hot"]]], dtype=dtype, requires_grad=True)
    for over_rows in ("max", "mean"):
        value = jasmin(logits, k=k, over_rows=over_rows)
        (slope,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert slope.isfinite().all()


def test_a_step_against_the_gradient_lowers_the_norm() -> None:
    logits = draw(1, 2, 5, 12, scale=2.0).requires_grad_()
    before = jasmin(logits, k=0)
    (slope,) = torch.autograd.grad(before, logits)
    assert jasmin(logits.detach() - 0.01 * slope, k=0) < before


def test_rows_that_see_one_key_do_not_count() -> None:
    logits = draw(1, 1, 3, 3)
    causal = logits + torch.full((3, 3), -torch.inf).double().triu(1)
    for k in (0, 2):
        assert torch.equal(jasmin(causal, k=k, over_rows="mean"), jasmin(causal[:, :, 1:], k=k, over_rows="mean"))
        assert torch.equal(jasmin(causal, k=k), jasmin(causal[:, :, 1:], k=k))
        alone = causal[:, :, :1].clone().requires_grad_()
        value = jasmin(alone, k=k)
        assert value == 0
        assert torch.autograd.grad(value, alone)[0].abs().max() == 0
    assert jasmin(draw(1, 1, 2, 1), k=0) == 0


def test_reductions_are_what_they_say() -> None:
    logits = draw(2, 3, 4, 6)
    rows = torch.stack([log_g_ratio(row, 3) for row in logits.reshape(-1, 6)]).reshape(2, 3, 4)
    choices: dict[Any, Callable[..., Tensor]] = {"max": torch.amax, "mean": torch.mean}
    for first, second, third in itertools.product(choices, repeat=3):
        expected = choices[third](choices[second](choices[first](rows, -1), -1), -1)
        found = jasmin(logits, k=3, over_rows=first, over_heads=second, over_batch=third)
        torch.testing.assert_close(found, expected)


# -- models -----------------------------------------------------------------------------------------------------------


def digits(seed: int = 0) -> DigitsViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsViT().double()
    with torch.no_grad():  # maps of a random start are uniform: make them differ
        for block in model.blocks:
            block.attention.query.weight.mul_(4)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return model


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """By capture: another way to the same logits."""
    return torch.stack([jasmin_of(found.attention).mean() for found in capture(model, *args, **kwargs)]).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@torch.no_grad()
def assert_slope(model: nn.Module, inputs: Tensor, penalty: Tensor) -> None:
    """The gradient of the penalty, by capture again: finite differences along a random direction of all parameters."""
    with torch.enable_grad():
        slopes = gradients(model, penalty)
    assert slopes
    parameters = dict(model.named_parameters())
    directions = {name: draw(*parameters[name].shape, seed=i) for i, name in enumerate(slopes)}
    values = []
    for step in (1e-6, -2e-6):
        for name, direction in directions.items():
            parameters[name].add_(direction, alpha=step)
        values.append(expected_of(model, inputs))
    got = sum(float((slopes[name] * direction).sum()) for name, direction in directions.items())
    assert abs(got) > 1e-3
    assert float(values[0] - values[1]) / 2e-6 == pytest.approx(got, rel=1e-4)


def test_the_digits_model_has_the_penalty_of_its_captured_blocks() -> None:
    model = digits().eval()
    with JaSMin(model) as reg:
        model(IMAGES)
        found = reg.penalty()
    torch.testing.assert_close(found, expected_of(model, IMAGES))
    assert_slope(model, IMAGES, found)


def test_layers_choose_what_counts() -> None:
    model = digits().eval()
    blocks = capture(model, IMAGES)
    for chosen in ([0], [1, 3], [3]):
        with JaSMin(model, layers=chosen) as reg:
            model(IMAGES)
            expected = torch.stack([jasmin_of(blocks[i].attention).mean() for i in chosen]).mean()
            torch.testing.assert_close(reg.penalty(), expected)
    with JaSMin(model, layers=[7]) as reg:
        model(IMAGES)
        with pytest.raises(InvalidInput, match=r"layers=\[7\].*got 4 attention layers"):
            reg.penalty()


def test_passes_since_the_last_penalty_are_averaged() -> None:
    model = digits().eval()
    with JaSMin(model) as reg:
        parts = []
        for image in IMAGES:
            model(image[None])
            parts.append(reg.penalty())
        for image in IMAGES:
            model(image[None])
        torch.testing.assert_close(reg.penalty(), torch.stack(parts).mean())


class WrittenOut(nn.Module):
    """Causal attention with a dropout that does nothing, in plain operations."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(-3, -2) for t in self.qkv(x).chunk(3, -1))
        logits = q @ k.mT * 3**-0.5
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        maps = self.drop(F.softmax(logits, dim=-1, dtype=torch.float64).to(x.dtype))
        return self.out((maps @ v).transpose(-3, -2).flatten(-2))


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


def hub(name: str, **options: Any) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11,
                **options,
            )
        ),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=16, **options)
        ),
    }  # fmt: skip
    return makers[name]()


TOKENS = torch.tensor([[1, 4, 2, 9, 3], [5, 5, 7, 1, 6]])  # 0 is padding, whose embedding gets no gradient
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "written out": (WrittenOut, draw(2, 5, 6, scale=3.0)),
    "multi-head": (lambda: MultiHead(False), draw(2, 5, 6, scale=3.0)),
    "multi-head with weights": (lambda: MultiHead(True), draw(2, 5, 6, scale=3.0)),
    "bert": (lambda: hub("bert", attn_implementation="sdpa"), TOKENS),
    "bert eager": (lambda: hub("bert", attn_implementation="eager"), TOKENS),
    "gpt2": (lambda: hub("gpt2", attn_implementation="sdpa"), TOKENS),
    "gpt2 eager": (lambda: hub("gpt2", attn_implementation="eager"), TOKENS),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_attending_is_seen(name: str) -> None:
    model, inputs = build(name)
    with JaSMin(model) as reg:
        model(inputs)
        found = reg.penalty()
    assert found > 0.1
    torch.testing.assert_close(found, expected_of(model, inputs))
    assert_slope(model, inputs, found)


class TwoMaps(nn.Module):
    """Two maps are made before the values meet the second of them, then the first."""

    def forward(self, first: Tensor, second: Tensor, values: Tensor) -> Tensor:
        one, other = first.softmax(-1), second.softmax(-1)
        return (other @ values) + (one @ values)


def test_maps_that_wait_together_are_told_apart() -> None:
    first, second = draw(1, 2, 4, 4), draw(1, 2, 4, 4, seed=1)
    model = TwoMaps()
    with JaSMin(model) as reg:
        model(first, second, draw(1, 2, 4, 3))
        torch.testing.assert_close(reg.penalty(), (jasmin(first) + jasmin(second)) / 2)


def test_only_the_model_counts() -> None:
    model, other = digits().eval(), digits(1).eval()
    with JaSMin(model) as reg:
        model(IMAGES)
        alone = reg.penalty()
        model(IMAGES)
        other(IMAGES)
        torch.testing.assert_close(reg.penalty(), alone)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_gradient_checkpointing_changes_nothing(layers: list[int] | None) -> None:
    model = digits().train()
    saved = copy.deepcopy(model)
    for block in saved.blocks:
        plain = block.forward
        block.forward = lambda tokens, plain=plain: checkpoint(plain, tokens, use_reentrant=False)  # type: ignore[method-assign]
    for each in (model, saved):
        with JaSMin(each, layers=layers) as reg:
            for _ in range(2):  # a second step must not see what backward of the first ran again
                each.zero_grad()
                (each(IMAGES).square().mean() + reg.penalty()).backward()
    for (name, one), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad)


def test_attention_without_gradients_is_an_error_where_they_are_wanted() -> None:
    model = digits()
    with JaSMin(model) as reg:
        with torch.no_grad():
            model(IMAGES)
            assert reg.penalty() > 0
            model(IMAGES)
        with pytest.raises(InvalidInput, match="use_reentrant=False"):
            reg.penalty()


def test_under_autocast_the_penalty_is_in_float32() -> None:
    model = digits().float()
    with JaSMin(model) as reg:
        model(IMAGES.float())
        plain = reg.penalty()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IMAGES.float())
            short = reg.penalty()
    assert short.dtype == torch.float32
    assert short.item() == pytest.approx(plain.item(), rel=0.05)
    assert gradients(model, short)["blocks.0.attention.query.weight"].isfinite().all()


COMPILED = """
import torch
from lipbounds.jasmin import JaSMin
from lipbounds.models.digits_vit import DigitsViT

torch.manual_seed(0)
model, images = DigitsViT().double(), torch.rand(3, 1, 8, 8).double()
compiled = torch.compile(model, backend="aot_eager")
found = []
for each in (model, compiled):
    with JaSMin(each, k=3) as reg:
        for _ in range(3):  # again from the cache
            each(images)
            penalty = reg.penalty()
        (slope,) = torch.autograd.grad(penalty, [model.blocks[0].attention.query.weight])
    found.append((penalty.detach(), slope))
assert found[0][1].abs().max() > 0
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
"""


def test_under_torch_compile_the_penalty_is_the_same() -> None:
    """In a process of its own: the shape checks that only tests switch on are not for the compiler."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


def test_the_model_is_left_as_it_was() -> None:
    model = digits()
    with pytest.raises(RuntimeError, match="on purpose"), JaSMin(model, layers=[0]):
        raise RuntimeError("on purpose")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


GOOD = draw(1, 2, 3, 4)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative": (lambda: jasmin(GOOD, k=-1), InvalidInput, "got k=-1"),
    "reduction": (lambda: jasmin(GOOD, over_heads="sum"), InvalidInput, "over_heads='sum'"),  # type: ignore[arg-type]
    "shape": (lambda: jasmin(GOOD[0, 0]), InvalidInput, r"got \(3, 4\)"),
    "no module": (lambda: JaSMin(len), InvalidInput, "got builtin_function"),  # type: ignore[arg-type]
    "not run": (lambda: JaSMin(digits()).penalty(), InvalidInput, "got 0 attention layers"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_keys_that_are_no_tokens_are_refused() -> None:
    model = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    with JaSMin(model), pytest.raises(Unsupported, match="keys must come from tokens"):
        model(*[torch.zeros(3, 1, 4)] * 3)


@pytest.mark.parametrize("sorted_by", ["numpy", "torch"])
@pytest.mark.parametrize("k", [0, 1, 2, 4, 10])
def test_scores_of_all_rows_are_those_with_a_gradient(k: int, sorted_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, one-hot and uniform rows, hidden keys, one visible key, fewer keys than k + 1; sorted in either way."""
    if sorted_by == "torch":
        monkeypatch.setattr(log_g, "numpy", None)
    draw = torch.Generator().manual_seed(0)
    rows = [row * torch.randn(4, 6, generator=draw, dtype=torch.float64) for row in (0.0, 0.1, 1.0, 10.0, 1e3)]
    tied = torch.tensor([[3.0, 3.0, 1.0, 1.0, 1.0, -2.0]], dtype=torch.float64)
    hidden = torch.randn(6, 6, generator=draw, dtype=torch.float64).masked_fill(
        torch.ones(6, 6).triu(1) > 0, -torch.inf
    )
    logits = torch.cat([*rows, tied, hidden])
    expected = log_g.log_g_1(logits) if k == 0 else log_g.log_g_ratio(logits, k)
    torch.testing.assert_close(log_g.scores(logits.clone(), k), expected, rtol=1e-12, atol=1e-12)
    single = logits[:, :1]
    expected = log_g.log_g_1(single) if k == 0 else log_g.log_g_ratio(single, k)
    torch.testing.assert_close(log_g.scores(single.clone(), k), expected)
