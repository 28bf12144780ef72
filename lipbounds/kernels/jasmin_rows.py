"""Whether the Triton kernel of JaSMin takes the maps of a call, and the scores of their rows by it.

It takes them on CUDA of compute capability 8.0 or newer where triton is installed, for float16, bfloat16 and float32,
heads whose width is a power of two from 16 to 128, k up to 15, at least `LONG` keys, and masks without a gradient.
Torch scores all others. Nothing was timed on a GPU so far: `LONG` keeps short maps, which torch stores easily, from the
search for tiles that Triton makes once for each size.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


LONG = 512  # keys
CAPABILITY = (8, 0)  # of tensor cores that take bfloat16


def kernel_takes(queries: Tensor, keys: Tensor, k: int, mask: Tensor | None, *, causal: bool) -> bool:
    """Whether `kernel_scores` can be asked.

    Args:
        queries: `[*batch, heads, n, d]`.
        keys: `[*batch, groups, m, d]`.
        k: of the score.
        mask: added to the logits.
        causal: whether the keys after each query are hidden.
    """
    if not available(queries.device):
        return False
    from lipbounds.kernels.triton_jasmin import LARGEST_K, WIDTHS

    width, (n, m) = queries.shape[-1], (queries.shape[-2], keys.shape[-2])
    if mask is not None and (mask.requires_grad or not _broadcasts(mask.shape, (*queries.shape[:-1], m))):
        return False
    return (
        queries.dtype == keys.dtype
        and queries.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and queries.dim() == keys.dim() >= 3
        and queries.shape[:-3] == keys.shape[:-3]
        and queries.shape[-3] % keys.shape[-3] == 0
        and keys.shape[-1] == width
        and WIDTHS[0] <= width <= WIDTHS[1]
        and width & (width - 1) == 0
        and m >= LONG
        and k <= LARGEST_K
        and not (causal and n != m)
    )


def _broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(own in (1, given) for own, given in ends)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel runs on a device.

    Args:
        device: of the queries.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def kernel_scores(
    queries: Tensor, keys: Tensor, scale: float, k: int, mask: Tensor | None, *, causal: bool
) -> tuple[Float[Tensor, "*batch heads n"], Bool[Tensor, "*batch heads n"]]:
    """The score of each row in float32, and which rows see more than one key and so count; differentiable once.

    Args:
        queries: as in `kernel_takes`.
        keys: as in `kernel_takes`.
        scale: of the logits.
        k: as in `kernel_takes`.
        mask: as in `kernel_takes`.
        causal: as in `kernel_takes`.
    """
    from lipbounds.kernels import triton_jasmin

    kernel: Any = triton_jasmin
    return kernel.scored_rows(queries, keys, scale, k, causal=causal, logit_bias=mask)
