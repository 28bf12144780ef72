"""Fields of a block with batch dimensions of their own: every bound is what it is at the items one by one."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds import Attention, get, select
from lipbounds.bound_spec import BoundSpec
from lipbounds.errors import InvalidInput
from lipbounds.targets._attention_checks import TRAILING, WEIGHTS
from lipbounds.targets._tensor_target import TensorTarget
from lipbounds.testing.oracles import batch_item, jacobian_norm
from lipbounds.testing.target_checks import item
from verify.unit.test_other_targets import cosine_block, l2_block, norm_block


pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")
BATCH = (2, 3)
LEADS = ((2, 1), (3,), (), (1, 3), (2, 1), (1,))  # given to the fields in turn; together they make BATCH
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"biases": True, "logit_bias": True},
    "rotary": {"biases": True, "rotary": True, "norm": True},
    "cross": {"biases": True, "memory": True},
}


def fields(*, biases: bool = False, logit_bias: bool = False, rotary: bool = False, norm: bool = False,
           memory: bool = False) -> dict[str, Any]:  # fmt: skip
    """Of a block with 2 heads in 1 group, 3 tokens of width 4, without batch dimensions."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made: dict[str, Any] = {"x": draw(3, 4), "w_q": draw(2, 4, 2), "w_k": draw(1, 4, 2), "w_v": draw(1, 4, 2)}
    made |= {"w_o": draw(2, 2, 4), "b_o": draw(4)}
    if biases:
        made |= {"b_q": draw(2, 2), "b_k": draw(1, 2), "b_v": draw(1, 2)}
    if logit_bias:
        made["logit_bias"] = draw(2, 3, 3)
    if rotary:
        angles = draw(3, 1)
        turned = torch.stack([angles.cos(), angles.sin()], -2)
        made |= {"query_rotation": turned, "key_rotation": turned.clone()}
    if norm:
        made |= {"query_norm_weight": draw(2, 2), "key_norm_weight": draw(1, 2), "norm_eps": 1e-3, "norm_over": "head"}
    if memory:
        made |= {"memory": draw(5, 4), "moves": "query"}
    return made


def repeated(name: str, tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Different numbers for each item of the batch; cosines and sines of other angles."""
    size = torch.linspace(0.7, 1.4, max(1, torch.Size(lead).numel()), dtype=tensor.dtype).reshape(lead)
    size = size.reshape(*lead, *[1] * tensor.dim())
    if not name.endswith("rotation"):
        return tensor * size
    angles = torch.atan2(tensor[..., 1:, :], tensor[..., :1, :]) * size
    return torch.cat([angles.cos(), angles.sin()], -2)


def value(spec: BoundSpec, block: Any) -> Tensor:
    return spec(block, 2.0 if spec.claim.scope == "compact" else 0.1 if spec.needs_radius else None).value


def check_items(specs: list[BoundSpec], block: Any) -> None:
    assert specs
    assert block.batch_shape == BATCH
    alone = batch_item(block, (1, 2)) if isinstance(block, Attention) else item(block, (1, 2))
    for spec in specs:
        together = value(spec, block)
        assert together.shape == BATCH, spec.name
        assert together[1, 2].item() == pytest.approx(value(spec, alone).item(), rel=1e-6), spec.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_bound_takes_fields_of_different_batch_dimensions(kind: str) -> None:
    given = fields(**KINDS[kind])
    tensors = [name for name, tensor in given.items() if isinstance(tensor, Tensor)]
    leads = {name: LEADS[index % len(LEADS)] for index, name in enumerate(tensors)}
    block = Attention(**{**given, **{name: repeated(name, given[name], lead) for name, lead in leads.items()}})
    check_items(select(kind="proved", role="bound", block=block), block)


@pytest.mark.parametrize("name", [name for name in TRAILING if name not in ("x", "logit_bias", "memory")])
def test_one_field_alone_with_a_batch_dimension_gives_all_of_them_one(name: str) -> None:
    given = fields(biases=True, rotary=True, norm=True)
    block = Attention(**{**given, name: repeated(name, given[name], (2,))})
    assert block.batch_shape == (2,)
    norms = jacobian_norm(block)
    for name in ("sharp_cheap", "covariance.exact"):
        assert (get(name)(block).value >= norms).all(), name


def test_weights_of_every_pair_of_batch_dimensions_get_a_common_one() -> None:
    given = fields(biases=True, norm=True)
    for one, other in permutations(WEIGHTS, 2):
        changed: dict[str, Any] = {one: repeated(one, given[one], (2, 1)), other: repeated(other, given[other], (3,))}
        block = Attention(**given | changed)
        leads = {getattr(block, name).shape[: -TRAILING[name]] for name in WEIGHTS}
        assert leads == {BATCH}, (one, other)
        torch.testing.assert_close(block.forward()[1, 2], batch_item(block, (1, 2)).forward())
        with pytest.raises(InvalidInput, match="leading batch dimensions must broadcast"):
            Attention(**changed | {one: changed[one].squeeze(1)} | {k: v for k, v in given.items() if k not in changed})


@pytest.mark.parametrize("make", [l2_block, cosine_block, norm_block])
def test_other_attention_takes_fields_of_different_batch_dimensions(make: Any) -> None:
    plain: TensorTarget = make()
    for one, other in permutations(plain.trailing, 2):
        changed = {one: repeated(one, plain.tensors[one], (2, 1)), other: repeated(other, plain.tensors[other], (3,))}
        block = plain.replace(**changed)
        check_items(list(select(block=block, kind="proved")), block)
