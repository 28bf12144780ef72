"""A result is used as a number, a bound is called with what capture returns, and both print in one line."""

from __future__ import annotations

import dataclasses as dc
import json

import numpy as np
import pytest
import torch
from torch import nn

import lipbounds
from lipbounds import BoundResult, Claim, InvalidInput
from lipbounds.bound_spec import EXACT_ARITHMETIC
from lipbounds.targets.mlp import Mlp
from lipbounds.targets.network import Network
from verify.unit.blocks import random_block


MODEL = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
X = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
SHARP = lipbounds.get("sharp")


def result(value: object = 2.5, norm: str = "l2") -> BoundResult:
    claim = Claim(kind="proved", norm=norm)  # pyright: ignore[reportArgumentType]
    return BoundResult(name="one", value=torch.as_tensor(value), claim=claim)


def test_one_number_is_used_as_a_number() -> None:
    one = result()
    assert (float(one), one.item(), f"{one:.2f}", f"{one}") == (2.5, 2.5, "2.50", repr(one))
    assert one < 3
    assert not one > result(2.6)
    assert min(result(4.0), one, result(3.0)) is one
    assert sorted([result(3.0), one])[0] is one


def test_batches_compare_item_by_item_and_are_no_single_number() -> None:
    several = result([1.0, 3.0])
    assert (several < 2.0).tolist() == [True, False]
    assert (several >= result(3.0)).tolist() == [False, True]
    for call in (float, BoundResult.item, "{:.3g}".format):
        with pytest.raises(InvalidInput, match=r"holds 2 numbers, one per batch item of shape \(2,\)"):
            call(several)


def test_numbers_in_two_norms_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="one in l2 and one in token"):
        _ = result() < result(norm="token")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numpy_keeps_every_value(dtype: torch.dtype) -> None:
    value = torch.tensor([1.5, 2.0078125], dtype=dtype)
    assert result(value).numpy().tolist() == value.tolist()


def test_a_captured_model_gives_values_without_a_graph() -> None:
    assert any(parameter.requires_grad for parameter in MODEL.parameters())
    (found,) = lipbounds.capture(MODEL, X)
    assert found.attention.w_q.requires_grad
    for name in ("sharp", "yudin2025.biased", "lanczos", "exact"):
        one = lipbounds.get(name)(found)
        assert not any(part.requires_grad for part in (one.value, *one.terms.values(), *one.details.values()))
        assert isinstance(one.numpy(), np.ndarray)
        json.dumps(one.to_dict())
        assert dc.asdict(one)["value"].shape == one.value.shape


def test_a_graph_is_there_where_it_is_asked_for_and_the_value_is_the_same() -> None:
    (found,) = lipbounds.capture(MODEL, X)
    biased = lipbounds.get("yudin2025.biased")
    without, asked = biased(found, precision="float64"), biased(found, grad=True)  # gradients are of float64
    assert torch.equal(without.value, asked.value.detach())
    asked.value.sum().backward()
    gradient = MODEL.self_attn.in_proj_weight.grad
    assert gradient is not None
    assert bool((gradient != 0).any())
    MODEL.zero_grad()


def test_tensors_in_tuples_are_cut_off_too() -> None:
    weights = tuple(torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((5, 4), (3, 5)))
    block = Mlp(x=torch.randn(4, dtype=torch.float64), weights=weights)
    assert not lipbounds.get("autolip")(block).value.requires_grad
    assert block.detached.detached is block.detached
    assert random_block().detached.x is not None


def test_a_bound_takes_what_capture_returns() -> None:
    found = lipbounds.capture(nn.Sequential(MODEL, MODEL), X)
    both, one, inside = SHARP(found), SHARP(found[1]), SHARP(found[1].attention)
    assert len(both) == 2
    assert torch.equal(both[1].value, one.value)
    assert torch.equal(one.value, inside.value)
    assert lipbounds.select(block=found[0]) == lipbounds.select(block=found[0].attention)


@pytest.mark.parametrize("name", ["exact", "lanczos", "lanczos_certificate", "power_iteration"])
def test_estimators_take_a_network_and_say_what_they_take_for_granted(name: str) -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    network = Network(lambda x: x @ matrix, torch.ones(3, dtype=torch.float64))
    one = lipbounds.get(name)(network)
    assert float(one) == pytest.approx(3.0)
    assert one.note == EXACT_ARITHMETIC
    assert EXACT_ARITHMETIC in repr(one)
    assert lipbounds.get(name) in lipbounds.select(block=network)


def test_a_bound_of_attention_takes_no_network() -> None:
    with pytest.raises(InvalidInput, match="sharp needs an Attention, got Network"):
        SHARP(Network(torch.sin, torch.ones(3)))  # pyright: ignore
    assert "sharp" not in {spec.name for spec in lipbounds.select(block=Network(torch.sin, torch.ones(3)))}


def test_a_bound_prints_in_one_short_line_and_a_selection_as_a_table() -> None:
    assert repr(SHARP) == "BoundSpec(sharp: proved, at a point, l2)"
    assert repr(lipbounds.get("hu2024.printed")).endswith("refuted)")
    table = repr(lipbounds.select(kind="proved", scope="point", norm="token"))
    head, *lines = table.splitlines()
    assert head.split() == ["name", "target", "kind", "scope", "norm", "supports", "source"]
    assert [line.split()[0] for line in lines] == ["covariance_token.exact", "emadi2026.balanced_mass"]
    assert repr(lipbounds.select(kind="probable", scope="global")) == "no bounds"
    assert lipbounds.select()._repr_html_().count("<tr>") == len(lipbounds.select()) + 1


def test_selection_by_norm_and_features() -> None:
    rotary = lipbounds.select(supports=["rotary", "qk_norm"])
    assert {"exact", "lanczos"} <= {spec.name for spec in rotary}
    assert all({"rotary", "qk_norm"} <= spec.supports for spec in rotary)
    assert {spec.claim.norm for spec in lipbounds.select(norm="token")} == {"token"}
    assert lipbounds.select(supports="mask") == lipbounds.select(supports=["mask"])


@pytest.mark.parametrize(
    "wrong", [{"kind": "upper"}, {"scope": "here"}, {"norm": "l1"}, {"role": "oracle"}, {"supports": "masks"}]
)
def test_a_value_that_does_not_exist_is_an_error(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="must be one of"):
        lipbounds.select(**wrong)  # pyright: ignore
