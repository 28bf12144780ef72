"""The 8x8 digits that come with scikit-learn, split once and for all."""

from __future__ import annotations

import dataclasses as dc

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


# Fixed, not an argument: under another split the committed weights would be judged on images they were trained on.
SPLIT_SEED = 0
TEST_IMAGES = 360
VALIDATION_IMAGES = 240


@dc.dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images with grey values in [0, 1], their classes, and their places in what they come from."""

    images: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    indices: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dc.dataclass(frozen=True, slots=True)
class DigitsSplit:
    """Three disjoint parts of labelled images, such as the 1797 digits, each with the classes in equal shares."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def load_digits_split() -> DigitsSplit:
    """The digits as float32 tensors: 1197 to train on, 240 to choose a model with, 360 to judge it on.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (the test part of it, as scikit-learn ships it).
    """
    from sklearn.datasets import load_digits  # a second of imports, which who only shows results does not need

    pixels, labels = load_digits(return_X_y=True)
    rest, test = _stratified(np.arange(len(labels)), labels, TEST_IMAGES)
    train, validation = _stratified(rest, labels, VALIDATION_IMAGES)
    # Pixels are whole numbers from 0 to 16: sixteenths are exact in float32.
    images = torch.from_numpy(pixels / 16).float().reshape(-1, 1, 8, 8)
    parts = (torch.from_numpy(part) for part in (train, validation, test))
    return DigitsSplit(*(LabelledImages(images[part], torch.from_numpy(labels)[part], part) for part in parts))


def _stratified(indices: np.ndarray, labels: np.ndarray, second_size: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        indices, test_size=second_size, random_state=SPLIT_SEED, stratify=labels[indices], shuffle=True
    )
    return np.sort(first), np.sort(second)
