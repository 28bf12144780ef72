"""The torch functions that capture recognises, sorted by what they do to a tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F


Functions = frozenset[Callable[..., Any]]


def _named(*names: str) -> Functions:
    """The functions of torch and the methods of torch.Tensor of these names."""
    found = (getattr(owner, name, None) for owner in (torch, torch.Tensor) for name in names)
    return frozenset(function for function in found if callable(function))  # torch.half is no function but a dtype


# Each entry of the result is an entry of the one tensor that comes in.
REINDEX: Functions = _named(
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"),
    *("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint", "flip", "roll"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select", "narrow", "index_select"),
    *("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "__getitem__"),
) | frozenset(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))
# A view needs strides that fit; replayed on an index tensor of other strides only the reshape is sure to work.
WITHOUT_STRIDES = {torch.Tensor.view: torch.Tensor.reshape, torch.Tensor.view_as: torch.Tensor.reshape_as}
# Re-indexing if all but one of the tensors are empty, as in the first step of a key-value cache.
JOIN: Functions = _named("cat", "concat", "concatenate")
STACK: Functions = _named("stack")
COPY: Functions = _named("contiguous", "clone", "detach")
CAST: Functions = _named("to", "type", "type_as", "float", "double", "half", "bfloat16")
DROPOUT: Functions = _named("dropout") | {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}

# Queries and keys that went through one of these are no linear function of the tokens; the second is a part of blocks.
NORMALIZE: Functions = frozenset({F.layer_norm, F.normalize, F.group_norm})
RMS_NORM: Functions = frozenset({F.rms_norm})
# The second norm written out: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().
SQUARE: Functions = _named("pow", "square", "__pow__")
MEAN: Functions = _named("mean")
INVERSE_ROOT: Functions = _named("rsqrt")
ROOT: Functions = _named("sqrt")
RECIPROCAL: Functions = _named("reciprocal", "__rdiv__", "__rtruediv__")

# What changes a row of logits by one number leaves its softmax alone.
ROW_MAXIMUM: Functions = _named("amax", "max")
SUM: Functions = _named("sum")
EXP: Functions = _named("exp")

MULTIPLY: Functions = _named("mul", "multiply", "__mul__", "__rmul__")
DIVIDE: Functions = _named("div", "divide", "true_divide", "__truediv__")
ADD: Functions = _named("add", "__add__", "__radd__")
SUBTRACT: Functions = _named("sub", "subtract", "__sub__")
NEGATE: Functions = _named("neg", "negative", "__neg__")
AS_COMPLEX: Functions = _named("view_as_complex")
AS_REAL: Functions = _named("view_as_real")
# Linear in tensors made of one projection, if all else that goes in is constant: what rotary positions are made of.
COMBINE: Functions = MULTIPLY | DIVIDE | ADD | SUBTRACT | NEGATE | JOIN | STACK | AS_COMPLEX | AS_REAL
FOLLOWED: Functions = REINDEX | COPY | CAST | DROPOUT | COMBINE
FILL: Functions = _named("masked_fill", "where")
SOFTMAX: Functions = _named("softmax") | {F.softmax, torch.special.softmax}
LOG_SOFTMAX: Functions = _named("log_softmax") | {F.log_softmax, torch.special.log_softmax}

LINEAR: Functions = frozenset({F.linear})
ADDMM: Functions = _named("addmm")
CONVOLUTION: Functions = frozenset({F.conv1d, F.conv2d, F.conv3d})
PRODUCT: Functions = _named("matmul", "mm", "bmm", "__matmul__")
EINSUM: Functions = _named("einsum")
# Products that are not matrix products, or not those alone.
OTHER_PRODUCT: Functions = _named("einsum", "tensordot", "inner", "baddbmm", "addbmm", "mv", "dot")
# Products of two tensors; a softmax over one of two activations is an attention map, whoever wrote it.
ANY_PRODUCT: Functions = (
    PRODUCT
    | OTHER_PRODUCT
    | LINEAR
    | ADDMM
    | CONVOLUTION
    | _named("cdist", "chain_matmul", "bilinear", "outer")
    | {F.bilinear, F.cosine_similarity, F.pairwise_distance, torch.linalg.multi_dot}
)
PROJECTION: Functions = LINEAR | ADDMM | CONVOLUTION | PRODUCT

FUSED_ATTENTION: Functions = frozenset({F.scaled_dot_product_attention})
MULTI_HEAD_ATTENTION: Functions = frozenset({F.multi_head_attention_forward})

# They ask a tensor what it is and touch no values; about half of all calls.
QUESTION: Functions = _named("size", "dim", "numel", "is_floating_point", "is_complex") | frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_nested", "requires_grad")
)
# Two calls with the same arguments give different results.
RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}
    | {"multinomial", "poisson", "dropout", "alpha_dropout", "feature_dropout", "rrelu", "gumbel_softmax", "empty"}
    | {"empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)

# The value of a tensor goes where no mode can see it.
DECIDE: Functions = _named("__bool__", "equal", "allclose", "is_nonzero")
LEAVE: Functions = (
    DECIDE
    | _named("item", "tolist", "numpy")
    | _named("__float__", "__int__", "__index__", "__complex__", "__array__", "__dlpack__")
)

# They make a tensor of numbers that torch did not compute.
FROM_NUMBERS: Functions = _named("tensor", "as_tensor", "asarray", "full", "scalar_tensor", "frombuffer")

# They take the shape, dtype or device of the second tensor, not its values.
FIRST_ONLY: Functions = CAST | _named("view_as", "reshape_as", "expand_as")
# They take the shape and dtype of a tensor, not its values.
LIKE: Functions = _named(
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
)


@cache
def canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is named in the sets above, where it was called as an operator of `torch.ops.aten`."""
    if not isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return function
    packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
    space, _, name = packet._qualified_op_name.partition("::")
    places = (F, torch, torch.Tensor) if space == "aten" else ()
    found = (getattr(place, name, None) for place in places)
    return next(filter(callable, found), function)


# What an in-place method computes, before it is written over its first argument.
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch.Tensor, name): getattr(torch.Tensor, name[:-1])
    for name in dir(torch.Tensor)
    if name.endswith("_") and not name.startswith("_") and callable(getattr(torch.Tensor, name[:-1], None))
}
