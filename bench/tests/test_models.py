"""The zoo: as many blocks as it says, always the same, in float64 and without batch dimensions."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.workloads.hashes import tensors_hash
from bench.workloads.models import SENTENCES, Model, interleaved, zoo


MODELS = {model.name: model for model in zoo()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_one_input_gives_one_block_a_layer(model: Model) -> None:
    cases = list(model.cases(1))
    assert [case.layer for case in cases] == list(model.bounded)
    assert {(case.model, case.input) for case in cases} == {(model.name, cases[0].input)}
    for case in cases:
        assert case.block.dtype == torch.float64
        assert case.block.x.dim() == 2
        assert case.block.batch_shape == ()
        # What is said of blocks that are not captured is what captured ones are.
        assert (case.width, case.features) == (case.block.x.shape[-1], case.block.features)
        assert case.size == max(case.block.x.numel(), case.block.tokens * case.block.w_o.shape[-1])


@pytest.mark.parametrize("name", ["torch-encoder", "random-1-head", "random-4-heads"])
def test_models_and_inputs_are_the_same_every_time_and_quick_ones_come_first(name: str) -> None:
    model = MODELS[name]
    torch.manual_seed(1)
    quick = [(case.model_hash, case.input_hash, case.layer) for case in model.cases(1)]
    torch.manual_seed(2)
    full = [(case.model_hash, case.input_hash, case.layer) for case in model.cases(model.inputs)]
    assert full[: len(quick)] == quick
    assert len(set(full)) == len(full) == model.inputs * model.layers
    for one, other in zip(model.cases(1), model.cases(1), strict=True):
        assert torch.equal(one.block.w_q, other.block.w_q)
        assert torch.equal(one.block.x, other.block.x)


def test_a_run_leaves_the_random_state_of_the_caller_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(MODELS["torch-encoder"].cases(1))
    list(MODELS["random-4-heads"].cases(1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["minilm-without-biases", "torch-encoder", "random-1-head", "random-4-heads"])
def test_the_theorem_as_printed_holds_for_the_models_made_for_it(name: str) -> None:
    assert all("biases" not in case.block.features for case in MODELS[name].cases(1))


def test_spreads_go_from_flat_to_peaked_attention() -> None:
    largest = [case.block.probabilities.amax(-1).mean().item() for case in MODELS["random-1-head"].cases(1)]
    assert largest == sorted(largest)
    assert largest[0] < 0.15
    assert largest[-1] > 0.75


def test_all_sentences_are_used_and_the_first_few_are_spread_out() -> None:
    count = len(SENTENCES.read_text(encoding="utf-8").splitlines())
    assert count == MODELS["minilm"].inputs == 32
    assert sorted(interleaved(count)) == list(range(count))
    assert interleaved(count)[:4] == [0, 16, 8, 24]
    assert [sorted(interleaved(size)) for size in range(1, 40)] == [list(range(size)) for size in range(1, 40)]


def test_the_hash_of_weights_depends_on_names_shapes_dtypes_and_numbers() -> None:
    zeros = torch.zeros(2, 3)
    variants = [("a", zeros), ("b", zeros), ("a", zeros.T), ("a", zeros.int()), ("a", zeros + 1)]
    hashes = [tensors_hash([variant]) for variant in variants]
    assert all(one != other for one, other in itertools.combinations(hashes, 2))
    assert tensors_hash([("a", zeros.T.contiguous().T)]) == hashes[0]
