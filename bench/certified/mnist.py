"""The ViT with one layer on MNIST that DeepT published radii of, and those radii, from a folder outside of this one.

The folder holds `mnist_vit_1.safetensors`, the weights of the network of Bonaert, Dimitrov, Baader, Vechev (Fast and
precise certification of transformers, PLDI 2021), and `radii_l2.csv`, `radii_linf.csv` and `radii_l1.csv`, their
certified radii of 100 random images; also `mnist_vit_3.safetensors`, the same with three layers, of which no radii are
published. The test images of MNIST (IDX files, `t10k-*.gz`) are in `mnist` inside the folder, or in `../../data/mnist`
beside it.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from bench.certified.classifier import Classifier
from bench.engine.store import Answer
from lipbounds.adapters._modules import attention_layers, checked, linear
from lipbounds.adapters.pixels import network_of_pixels
from lipbounds.compose.taylor.ball import Norm
from lipbounds.errors import InvalidInput
from lipbounds.models.idx import has_idx_files, read_idx_folder
from lipbounds.targets.layers import Layer, Linear, Patches, Pointwise, Pool, Positions, Residual, Sequence


SOURCE = "Bonaert, Dimitrov, Baader, Vechev, Fast and precise certification of transformers, PLDI 2021"
MEAN, STD = 0.1307, 0.3081
SIDE, WINDOW, DIM, HEADS, CLASSES = 28, 7, 64, 4, 10
DRAWN, SEED = 200, 0  # images in random order, of which those are certified that come first


class _Centre(nn.Module):
    """A token without the mean of its features, then a scale and a shift: no division by a deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) + self.bias


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, HEADS * DIM, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(HEADS * DIM, DIM)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def _layer() -> nn.ModuleList:
    mlp = nn.ModuleDict({"0": nn.Linear(DIM, 2 * DIM), "3": nn.Linear(2 * DIM, DIM)})
    first = nn.ModuleDict({"norm": _Centre(), "fn": _Attention()})
    second = nn.ModuleDict({"norm": _Centre(), "fn": nn.ModuleDict({"net": mlp})})
    return nn.ModuleList([nn.ModuleDict({"fn": first}), nn.ModuleDict({"fn": second})])


class MnistViT(nn.Module):
    """The network from pixels in [0, 1] to logits; its parameters are named as in the published files.

    Args:
        depth: number of layers.
    """

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.to_patch_embedding = nn.ModuleDict({"1": nn.Linear(WINDOW * WINDOW, DIM)})
        self.pos_embedding = nn.Parameter(torch.zeros(1, (SIDE // WINDOW) ** 2 + 1, DIM))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(_layer() for _ in range(depth))})
        self.mlp_head = nn.ModuleList([_Centre(), nn.Linear(DIM, CLASSES)])

    def forward(self, images: Tensor) -> Tensor:
        x = (images - MEAN) / STD
        patches = x.unfold(2, WINDOW, WINDOW).unfold(3, WINDOW, WINDOW).reshape(len(x), -1, WINDOW * WINDOW)
        tokens = self.to_patch_embedding["1"](patches)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embedding
        for attention, mlp in _layers(self):
            tokens = tokens + attention["fn"]["fn"](attention["fn"]["norm"](tokens))
            net = mlp["fn"]["fn"]["net"]
            tokens = tokens + net["3"](net["0"](mlp["fn"]["norm"](tokens)).relu())
        return self.mlp_head[1](self.mlp_head[0](tokens[:, 0]))


def _layers(model: MnistViT) -> Any:
    return model.transformer["layers"]


def load_mnist(folder: Path, device: torch.device, depth: int = 1) -> Classifier:
    """The classifier with images in random order.

    Args:
        folder: as at the top of this file.
        device: where they are.
        depth: number of layers, 1 or 3.

    Raises:
        InvalidInput: a file is missing.
    """
    from safetensors.torch import load_file

    path = folder / f"mnist_vit_{depth}.safetensors"
    _must_be(path)
    model = MnistViT(depth)
    model.load_state_dict(load_file(path))
    model = model.eval().to(device)
    images, labels, indices = some_test_images(folder)
    images = images.to(device)
    return Classifier(
        model=model,
        network=lambda: _network(model, images[:2]),
        images=images,
        labels=labels.to(device),
        indices=indices,
    )


def some_test_images(folder: Path) -> tuple[Tensor, Tensor, list[int]]:
    """Test images of MNIST in random order, in [0, 1], their labels and their places in the file.

    Args:
        folder: as at the top of this file.

    Raises:
        InvalidInput: the files are missing or damaged.
    """
    places = (folder / "mnist", folder / ".." / ".." / "data" / "mnist")
    images, labels, _ = read_idx_folder(next(filter(has_idx_files, places), places[0]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:DRAWN]
    return images[order].unsqueeze(1).float() / 255, labels[order], order.tolist()


def published(folder: Path, norm: Norm = "l2") -> Answer:
    """The radii that DeepT certified: mean, median and extremes in a norm of pixels, and seconds per image.

    Args:
        folder: as at the top of this file.
        norm: of the balls.

    Raises:
        InvalidInput: the file is missing.
    """
    path = folder / f"radii_{norm.replace('_', '')}.csv"
    _must_be(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    radii, seconds = [float(row["eps"]) for row in rows], [float(row["timing"]) for row in rows]
    return {
        "source": SOURCE,
        "mean": mean(radii),
        "median": median(radii),
        "smallest": min(radii),
        "largest": max(radii),
        "images": len(radii),
        "seconds": mean(seconds),
    }


def _network(model: MnistViT, images: Tensor) -> Sequence:
    """The model in float64 as a network of pixels."""
    x = images.double()
    wide = MnistViT(len(_layers(model)))
    wide.load_state_dict(model.state_dict())
    wide = wide.double().eval().to(x.device)
    blocks: list[tuple[str, Layer]] = []
    for index, (attention, (one, two)) in enumerate(zip(attention_layers(wide, x), _layers(wide), strict=True)):
        net, name = two["fn"]["fn"]["net"], f"layers.{index}." if len(_layers(wide)) > 1 else ""
        first = Residual(Sequence((_centred(one["fn"]["norm"]), attention), ("centre", "attention")))
        into, scale = linear(net["0"]), _centred(two["fn"]["norm"])
        assert scale.bias is not None
        assert into.bias is not None
        joined = Linear(into.weight @ scale.weight, into.bias + into.weight @ scale.bias)
        second = Residual(Sequence((joined, Pointwise("relu"), linear(net["3"])), ("in", "activation", "out")))
        blocks += [(f"{name}attention", first), (f"{name}feed-forward", second)]
    blocks.insert(len(blocks) - 1, ("class token", Pool("first")))
    layers: list[tuple[str, Layer]] = [
        ("patches", Patches((WINDOW, WINDOW), (WINDOW, WINDOW))),
        ("embedding", linear(wide.to_patch_embedding["1"])),
        ("positions", Positions(wide.cls_token[0].detach(), wide.pos_embedding[0].detach())),
        *blocks,
        ("norm", _centred(wide.mlp_head[0])),
        ("head", linear(wide.mlp_head[1])),
    ]
    normalised = Sequence(tuple(layer for _, layer in layers), tuple(name for name, _ in layers))
    of_pixels = network_of_pixels(normalised, MEAN, STD)
    return checked(list(of_pixels.named()), x, wide)


def _centred(module: nn.Module) -> Linear:
    weight, bias = (value.detach() for value in module.parameters())
    centring = torch.eye(DIM, dtype=weight.dtype, device=weight.device) - 1 / DIM
    return Linear(weight.unsqueeze(1) * centring, bias)


def _must_be(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput(f"--deept must name a folder with {path.name} (and mnist/t10k-*.gz), got none at {path}.")
