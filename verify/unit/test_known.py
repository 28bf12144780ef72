"""Blocks with a norm in closed form: the form is the truth, bounds respect it at thousands of tokens, faults do not."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds import Attention, InvalidInput
from lipbounds.testing import oracles
from lipbounds.testing.contract import run_check
from lipbounds.testing.global_state import around
from lipbounds.testing.known import ANY_NUMBER, FAMILIES, instances, known, radius_for
from lipbounds.testing.snippet_run import why_not
from lipbounds.testing.verdict import Refuted
from verify.faults.faults_published import theorem3_despite_biases
from verify.unit.sample_bounds import spec


CHEAP = ("yudin2025.theorem3", "yudin2025.biased_half", "centred.weights", "covariance.trace")
WITH_DEFAULTS = (*CHEAP, "sharp", "sharp_fast", "sharp_ball.direct", "havens2024.change", "covariance.exact", "lanczos")


@pytest.mark.parametrize("tokens", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_is_the_norm(family: str, tokens: int) -> None:
    instance = known(family, tokens + (family in ANY_NUMBER))
    assert instance.constant == pytest.approx(float(oracles.jacobian_norm(instance.block)), rel=1e-13)


def test_what_does_not_exist_is_refused() -> None:
    for family, tokens in (("two values", 6), ("sink", 1), ("a wish", 4)):
        with pytest.raises(InvalidInput, match="family must be one of"):
            known(family, tokens)


def test_theorem_3_at_2049_tokens_in_a_short_default_dtype() -> None:
    bound, instance = lipbounds.get("yudin2025.biased_half"), known("hidden keys", 2049)
    with around()["default dtype float16"]:
        claimed = bound(instance.block).value.item()
    assert claimed >= instance.constant * (1 - 1e-12)


@pytest.mark.parametrize("name", WITH_DEFAULTS)
def test_an_attention_sink_of_257_tokens_in_a_short_default_dtype(name: str) -> None:
    bound, instance = lipbounds.get(name), known("hidden keys", 257)
    with around()["default dtype bfloat16"]:
        claimed = bound(instance.block, radius_for(bound, instance.block)).value.item()
    if bound.claim.kind == "proved":
        assert claimed >= instance.constant * (1 - 1e-12)  # 16.0 V instead of 16.03 V, once
    else:
        assert claimed == pytest.approx(instance.constant, rel=1e-9)


@pytest.mark.parametrize("name", [*WITH_DEFAULTS, "sharp_ball", "kim2021.dot_product_compact", "ascent_pairs"])
def test_no_constant_lies_on_the_default_device(name: str) -> None:
    """As on a GPU: what a bound makes must lie where its block lies, and tensors on `meta` meet no others."""
    bound, block = lipbounds.get(name), known("dead head", 4).block
    radius = radius_for(bound, block)
    expected = bound(block, radius).value
    with torch.device("meta"):
        found = bound(block.replace(), radius).value
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["ascent_pairs", "ascent_jacobians"])
def test_ascent_under_inference_mode(name: str) -> None:
    bound, outside = lipbounds.get(name), known("two values", 4).block
    with torch.inference_mode():
        inside = known("two values", 4).block
        values = [bound(block, 0.5).value.item() for block in (inside, outside)]
    assert values == [bound(outside.replace(), 0.5).value.item()] * 2
    assert bound(inside, 0.5).value.item() == values[0]


def test_lengths_grow_while_they_are_cheap() -> None:
    bound = spec(lambda block: block.x.new_full((), 1e9))
    lengths = [block.tokens for block, _ in instances(bound, 1e9)]
    assert lengths == sorted(lengths, key=lambda n: n // 10 * 10) or max(lengths) >= 4096
    assert {17, 65, 257, 2049, 4097} <= set(lengths)
    assert max(block.tokens for block, _ in instances(bound, 0.0)) <= 17


def test_a_refusal_counts_as_not_tried() -> None:
    from lipbounds.errors import UnsupportedAttention

    def short(block: Attention) -> torch.Tensor:
        if block.tokens > 20:
            raise UnsupportedAttention("20 tokens at most.")
        return oracles.jacobian_norm(block)

    seen: list[int] = []
    tried = run_check(spec(short), "closed_form", seen=lambda block: seen.append(getattr(block, "tokens", 0)))
    assert tried >= 12
    assert len(seen) == tried


def test_theorem_3_despite_biases_is_refuted_by_the_first_blocks() -> None:
    """A published bound used for what it was not proved for; these blocks are the same for every seed."""
    spec = theorem3_despite_biases.spec
    seen: list[object] = []
    with pytest.raises(Refuted, match=r"at 'biased queries' with n = 16 the norm is .* below it") as raised:
        run_check(spec, "closed_form", max_examples=20, seed=0, seen=seen.append)
    assert len(seen) <= len(FAMILIES)
    assert not why_not(raised.value.snippet, spec)
