"""The common shape of leading dimensions is the one torch broadcasts to."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lipbounds.ops.shapes import broadcast_shape


SHAPES = st.lists(st.lists(st.sampled_from((0, 1, 2, 3)), max_size=3).map(tuple), max_size=4)


@given(shapes=SHAPES)
def test_the_shape_is_that_of_torch(shapes: list[tuple[int, ...]]) -> None:
    try:
        expected = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        with pytest.raises(ValueError, match="does not broadcast"):
            broadcast_shape(shapes)
    else:
        assert broadcast_shape(shapes) == expected
